# %% [markdown]
# # CLIP-RC, step by step
# One image goes through the method of *Exploring Regional Clues in CLIP for Zero-Shot Semantic
# Segmentation* (Zhang et al., CVPR 2024). Each step shows the paper's equation, the lines of this
# repository that compute it, and what comes out. Read it as a chapter, or run
# [walkthrough.ipynb](walkthrough.ipynb) and change things.
# ## The question
# *Semantic segmentation* gives every pixel of an image a class name. A program learns this from
# masks, in which people have marked each pixel's class. **Zero-shot segmentation** asks for more:
# find classes that no mask ever showed. Classes with masks are called *seen*, the others *unseen*.
# What a program can know of unseen classes comes from CLIP, which was trained on images and their
# captions (ours is a small one, whose captions had all the names below). CLIP knows what a name
# looks like, but it answers for an image as a whole. CLIP-RC teaches it to answer for pixels.
#
# Our images are drawn by a program: rugs on a floor, which has no class and is not scored. A class
# is a pattern and a colour. Of {{ C }} classes {{ len(unseen) }} are unseen.
# [train.py](../train.py) trained the model, without the scene below. It is right on
# {{ (answer == rug)[label == rug].float().mean():.0%}} of the unseen rug, a {{ names[rug] }}.
# %%
import sys
from pathlib import Path

sys.path.insert(0, str(next(folder for folder in (Path.cwd(), *Path.cwd().parents)
                            if (folder / "rlb_attention.py").exists())))  # the repository
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

import data
from eval import (LOWER, class_iou, confusion_matrix, label_map, slide_inference, window_corners,
                  zero_shot_metrics)
from model import model_from_checkpoint, nel_losses, pseudo_labels, segmentation_map
from predict import untrained_encoder
from rlb_attention import masked_attention, region_mask
from util import draw, toy
from util.checkpoint import TOY_MODEL, checkpoint_clip, read_checkpoint
from util.clip_files import encode_text
from util.images import IGNORE, normalise

SCENE = 148  # of the 200 that training does not use
torch.set_grad_enabled(False)
checkpoint = read_checkpoint(TOY_MODEL)
model = model_from_checkpoint(checkpoint, TOY_MODEL)
dataset = data.open_dataset("toy", toy.draw_world(), "val")
names, unseen, C = dataset.class_names, list(dataset.unseen), len(dataset.class_names)
seen = [c for c in range(C) if c not in unseen]
scene, label = data.read_pair(dataset, SCENE)
images = normalise(np.array(scene))[None]  # (1, 3, 64, 64)
label = torch.from_numpy(label)  # (64, 64), class numbers; IGNORE, 255, is the floor
present = label[label != IGNORE].unique().tolist()
rug, seen_rug = (next(c for c in present if c in kind) for kind in (unseen, seen))
# %% question.png: The scene; its mask for training, without the unseen rug; what CLIP-RC answers
def heat(values, low=0, high=1):  # (h, w): violet is low, green in the middle, yellow high
    grey = Image.fromarray((255 * (values - low) / (high - low)).clamp(0, 255).byte().numpy())
    return draw.fit(ImageOps.colorize(grey, "#440154", "#fde725", "#21918c"), 384)

def spotlight(weights, cell=(0, 0, 0, 0)):  # (N): the scene, lit by the square roots of weights
    light = 0.15 + 0.85 * (weights / weights.max()).sqrt().view(8, 8, 1).numpy()
    pixels = np.array(scene) * light.repeat(8, 0).repeat(8, 1)
    image = draw.fit(Image.fromarray(pixels.astype(np.uint8)), 384)
    ImageDraw.Draw(image).rectangle([48 * side for side in cell], None, draw.YELLOW, 5)
    return image

def labelled(prediction):  # (64, 64); the floor is left out, as it belongs to no class
    prediction = torch.where(label == IGNORE, IGNORE, prediction).byte().numpy()
    return draw.label_image(scene, prediction, names, unseen, 384)

scores = slide_inference(model, images, checkpoint["text"], 64, 53)  # (C, 64, 64)
answer, _ = label_map(scores, label.shape, seen, LOWER)  # (64, 64), class numbers
given = torch.where(torch.isin(label, torch.tensor(unseen)), IGNORE, label)
draw.grid([[draw.fit(scene, 384), labelled(given), labelled(answer)]],
          ["the scene", "mask for training", "the answer"], note=draw.NOTE)
# %% [markdown]
# **Try it.** Set `SCENE` to 12, 18 or 132: the same class in other company. Then run all cells.
# ```text
# image ── N patches ────┐
# [CLS], K prompts ──────┼── L layers of CLIP ── G, I, R ─┬─ Î (Eq. 4) ───┐
# M region tokens ───────┘   with a mask (Eq. 1-3)        ├─ R̂ (Eq. 5-6) ─┴─ decoder ── C maps
# C class names ── CLIP's text encoder ── T ──────────────┘                 (Eq. 7)   (Eq. 8)
# ```
# Here $N$ = {{ N }}, $K$ = {{ K }}, $M$ = {{ M }}, $C$ = {{ C }}, $L$ = {{ L }}, and a feature has
# $D$ = {{ D }} numbers. In the paper, on VOC, they are 1024, 10, 16, 20, 12 and 512.
# ## Before Section 3: patches and CLIP
# CLIP has two halves. The *text encoder* turns "a photo of a {{ names[rug] }}" into {{ D }}
# numbers, a vector of length 1. $T$ holds one such row for each class name. The *image encoder*
# makes {{ N }} patches of the image, and a vector, a *token*, of each patch. One more token,
# **[CLS]**, stands for the whole image. In each of {{ L }} layers every token gathers what it needs
# from the others. This is *attention*. At the end, [CLS] is the image's feature $G$. The halves
# were trained so that the dot product of image and caption, at most 1, is high:
# %%
T = encode_text(checkpoint_clip(checkpoint, TOY_MODEL), names, dataset.templates)  # (C, D)
untrained = untrained_encoder(model.encoder.visual, regions=16)  # CLIP as it is
G_clip, I_clip, R_clip = untrained(images)
for c in (G_clip[0] @ T.T).argsort(descending=True)[:4]:
    print(f"{G_clip[0] @ T[c]:.2f}  {names[c]}")
# %% patches.png: The scene, its 64 patches (thin lines) and its 16 regions (thick lines)
(N, D), M, (L, K, _) = I_clip.shape[1:], R_clip.shape[1], model.encoder.prompts.shape
m, lines = model.encoder.region_grid, draw.fit(scene, 768)
for i in range(96, 768, 96):
    for ends in ((i, 0, i, 768), (0, i, 768, i)):
        ImageDraw.Draw(lines).line(ends, "white", 3 if i % 192 else 12)
lines
# %% [markdown]
# CLIP's two best names are right, but it does not say where these rugs are, and it all but
# overlooks the {{ names[rug] }} ({{ G_clip[0] @ T[rug]:.2f}}). Between one answer for the image and
# one for each pixel CLIP-RC puts a step: **regions**, here of 2 × 2 patches (thick lines).
# **Try it.** `(T @ T.T)[rug].topk(4)` shows what CLIP finds alike: names that share a word.
# ## 3.2 The region-level bridge
# ### Eq. 1: what goes in
# $$X^0 = [G^0, P^0, I^0, R^0]$$
# CLIP's own sequence is [CLS], $G^0$, and the patches, $I^0$. Two kinds of token are new.
# **Prompts**, $P$, are {{ K }} trained vectors in each layer, the same for all images. They steer
# CLIP, which is *frozen*: not trained. **Region tokens**, $R$, are one more [CLS] for each region.
# {{ excerpt("rlb_attention.first_input") }}
# %%
def watch(part):  # a list that gets (inputs, output) of a part of the model whenever it runs
    calls = []
    part.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output)))
    return calls

blocks = model.encoder.visual.transformer.resblocks
layers = [watch(block.ln_1) for block in blocks]
aligned, joined = watch(model.ram), watch(model.ram.image_proj)
both = zip(model.decoder.image_blocks, model.decoder.descriptor_blocks)
decoder_layers = [[watch(block) for block in pair] for pair in both]
logits, I, R_hat, I_d, R_d = model.features(images, T)  # all of Fig. 3 (a), once
X0 = layers[0][0][0][0][0]  # what the first layer was given
assert torch.equal(X0[-M:], X0[-1:].expand(M, -1))  # the region tokens
print(f"{len(X0)} = 1 + {K} + {N} + {M} tokens of {X0.shape[1]} numbers")
# %% [markdown]
# All region tokens begin as one vector, a copy of what CLIP gives to [CLS], and stay untrained.
# CLIP knows how to fill such a token with a summary. (The released code adds the class embedding to
# [CLS] once more.) What makes token 8 the token of cell 8? Only the mask.
# **Try it.** Set `model.encoder.class_embedding_twice = False` first: `X0[0]` equals `X0[-1]`.
# ### Fig. 5: the mask
# | who | may attend to |
# |---|---|
# | [CLS] and the prompts | [CLS], the prompts, all patches |
# | a patch | the same, and the **one** region token of its own cell |
# | a region token | the patches **of its own cell**, and itself; nothing else |
# So in the first layer a region token does what [CLS] does, as if its cell were the whole image,
# without prompts. From the second layer on, the patches of its cell have read the whole image and
# the prompts, and the region token gets some of that from them.
# {{ excerpt("rlb_attention.region_mask") }}
# The matrix for 4 × 4 patches, 2 × 2 regions and 2 prompts, then three of our {{ len(mask) }} rows:
# %% mask.png: Fig. 5 (c), the matrix: rows may attend to the columns that are coloured
draw.mask_image(region_mask(2, 4, 2).numpy(),
                [("[CLS]", 1), ("prompts", 2), ("patches", 16), ("regions", 4)])
# %% rows.png: What [CLS], one patch and one region token may attend to
mask, p, r = region_mask(K, 8, m), 1 + K, 1 + K + N  # patches begin at p, region tokens at r
rows = {"[CLS] sees": [0], "patch 29 sees": [p + 29, (5, 3, 6, 4)], "token 8 sees": [r + 8]}
above = [spotlight(mask[row, p:r].float(), *cell) for row, *cell in rows.values()]
below = [heat(mask[row, r:].view(m, m) * 1).resize((192, 192)) for row, *_ in rows.values()]
draw.grid([above, below], [*rows], note="above: which patches; below: which of the region tokens")
# %% [markdown]
# **Try it.** With `region_mask(K, 8, 8)` and `view(8, 8)` in that cell, each region is one patch.
# ### Eq. 2: attention under the mask
# $$\mathrm{softmax}\left(\frac{QK^\top}{\sqrt{d_v}} + \mathrm{Mask}\right)V$$
# Each token asks for something: its *query*, a row of $Q$. Each token offers a *key*, a row of $K$,
# and a *value*, a row of $V$. The dot product of query and key is a score. The softmax turns a
# token's scores into the weights with which it mixes the values; minus infinity becomes weight 0.
# All this in {{ attention.num_heads }} *heads*, with $d_v$ = {{ Q.shape[-1] }} numbers each.
# {{ excerpt("rlb_attention.masked_attention") }}
# By hand, for a region token in the second layer, whose cell lies on the {{ names[rug] }}:
# %%
region, X, attention = 8, layers[1][0][1], blocks[1].attn  # X: (1, E, D_v)
Q, Key, V = F.linear(X[0], attention.in_proj_weight, attention.in_proj_bias).unflatten(
    -1, (3, attention.num_heads, -1)).permute(1, 2, 0, 3)  # each (heads, E, d_v)
scores = torch.einsum("hd,hkd->hk", Q[:, r + region], Key) / Q.shape[-1]**0.5  # (heads, E)
before = scores.softmax(-1)
after = scores.masked_fill(~mask[r + region], -torch.inf).softmax(-1)
by_hand = attention.out_proj(torch.einsum("hk,hkd->hd", after, V).flatten())
assert torch.allclose(by_hand, masked_attention(X, attention, mask)[0, r + region], atol=1e-4)
own = mask[r + region, p:r]  # the patches of its cell
for title, weights in (("before", before.mean(0)), ("after", after.mean(0))):
    print(f"{title:<7} own cell {weights[p:r][own].sum():4.0%}, itself {weights[r + region]:4.0%}, "
          f"other patches {weights[p:r][~own].sum():4.0%}, other tokens the rest")
# %% attention.png: Where region token 8 looks, before and after the mask
cell = (region % m * 2, region // m * 2, region % m * 2 + 2, region // m * 2 + 2)
shown = torch.ones(N), before.mean(0)[p:r], after.mean(0)[p:r]
draw.grid([[spotlight(weights, cell) for weights in shown]],
          [f"cell of token {region}", "before the mask", "after the mask"])
# %% [markdown]
# Without a mask, all region tokens would ask the same question of the same tokens in every layer,
# and would end as {{ M }} copies of one summary.
# **Try it.** Set `region` to 12, a cell of bare floor: the token finds little and keeps to itself.
# ### Eq. 3: what comes out
# $$X^L = [G, -, I, R]$$
# {{ excerpt("rlb_attention.Encoder.forward", "for l, block", "# Eq. 3") }}
# The dash is where the prompts were: they are dropped. They are tools and show no part of the
# image. What would break if they were kept? Counted with $I$, they would make {{ N + K }} rows,
# which form no grid of 8 × 8. A row would no longer tell its place in the image, no map could be
# laid over it, and the decoder (Sec. 3.4) would compare names with {{ K }} tokens of nothing.
# ### Fig. 2: what a region token is worth
# CLIP names a token by the row of $T$ with the largest dot product. In all 200 scenes:
# %%
scenes, labels = zip(*(data.read_pair(dataset, i) for i in range(200)))
_, I_all, R_all = untrained(torch.stack([normalise(np.array(each)) for each in scenes]))
for title, tokens, n in (("region tokens", R_all, m), ("patch tokens", I_all, 8)):
    middle = slice(32 // n, 64, 64 // n)  # a cell's class is that of the pixel in its middle
    truth = torch.from_numpy(np.stack(labels)[:, middle, middle]).flatten(1)  # (200, n n)
    right = ((tokens @ T.T).argmax(-1) == truth)[truth != IGNORE]
    print(f"{title:<14} {right.float().mean():4.0%} of {len(right):,} on rugs named correctly")
# %% names.png: Untrained CLIP names the regions well and the patches badly
regions, patches = ((tokens[0] @ T.T).argmax(-1).numpy() for tokens in (R_clip, I_clip))
regions, patches = (np.uint8(answers).reshape(n, n).repeat(64 // n, 0).repeat(64 // n, 1)
                    for answers, n in ((regions, m), (patches, 8)))  # (64, 64)
draw.grid([[draw.label_image(scene, regions, names, unseen, 600),
            draw.right_and_wrong(scene, patches, label.numpy(), 600)]],
          ["each region's name", "each patch's name"], [*zip(draw.VERDICTS, ("right", "wrong"))])
# %% [markdown]
# This is the observation behind the paper. CLIP as it is recognises regions, but not patches:
# nobody ever asked a patch's token to fit a caption. Region tokens know *what*, patch tokens know
# *where*. The rest of the method joins the two.
# **Try it.** Begin with `untrained = untrained_encoder(model.encoder.visual, 64)` and write 8 for
# `m`: each region is one patch. Its region token knows it far better than its own token does.
# ## 3.3 The region alignment module
# ### Eq. 4: features of three sizes
# $$\hat I = \mathrm{Concat}(\mathrm{Upsample}(G), \mathrm{Upsample}(R), I)$$
# Each patch gets three vectors, one behind the other: what the image shows, what the region around
# it shows, what the patch itself shows. $\hat I$ has {{ N }} rows of 3 × {{ D }} numbers.
# {{ excerpt("model.RegionAlignment.forward", "m, G_up = math", "I_hat =") }}
# %% aligned.png: The patches' features as colours: I alone, I with R, I with G
def colours(x, like=None):  # (N, D): the directions of most difference are red, green and blue
    basis = torch.linalg.svd((x if like is None else like) - x.mean(0))[2][:3]  # (3, D)
    place = (x - x.mean(0)) @ (basis * basis.sum(1, keepdim=True).sign()).T  # (N, 3)
    pixels = 255 * (0.5 + place / (4 * place.std(0))).clamp(0, 1).view(8, 8, 3)
    return draw.fit(Image.fromarray(pixels.byte().numpy()), 384)
(G, _, R, _, _), ((I_hat,), _) = aligned[0][0], joined[0]
G_up, R_up = I_hat[0].split(D, -1)[:2]
draw.grid([[colours(torch.cat(x, -1)) for x in ([I[0]], [R_up, I[0]], [G_up, I[0]])]],
          ["I alone", "with R", "with G"])
# %% [markdown]
# Similar colours mean similar features. With $R$ the patches of a rug come closer together. $G$
# changes no colour: it is the same at every patch, and tells all of them what else the image shows.
# **Try it.** `colours(R_up)` shows the regions alone, blurred by the upsampling.
# ### Eq. 5 and 6: a descriptor for each region and each class
# $$R_a = \mathrm{Upsample}(G) + R, \quad \hat R = \mathrm{Concat}[T \odot R_a, T]$$
# Descriptors are the questions that the decoder asks the patches. A bare name would be the same
# question in every image. So each name is multiplied, number by number ($\odot$), with what each
# region shows, and kept beside the product. That makes one descriptor for each region and each
# name, $M \cdot C$ = {{ M * C }}. One reads "{{ names[rug] }}, in the light of region 8".
# {{ excerpt("model.RegionAlignment.forward", "R_a =", "R_hat =") }}
# %% descriptors.png: For the three names, how well each region fits
fit = R_hat[0, ..., :D].sum(-1)  # (M, C): the sum of each product T * R_a ...
assert torch.allclose(fit, (G + R[0]) @ T.T, atol=1e-4)  # ... is a dot product
draw.grid([[heat(fit[:, c].view(m, m), -0.1, fit.max()) for c in present]],
          [names[c] + "*" * (c in unseen) for c in present])
# %% [markdown]
# Each square is a descriptor. Its colour is the sum of the product's {{ D }} numbers, which is the
# dot product of name and region, as in Fig. 2. The descriptor keeps the {{ D }} numbers apart, and
# the decoder learns what to make of them. It learns no names by heart, so a new one will do.
# **Try it.** Put `fit = (G @ T.T).expand(M, C)` before `draw`: without $R$ the squares are flat.
# ## 3.4 The decoder and the recovery decoder
# ### Eq. 7: patches ask names, names ask patches
# $$\hat I_d, \hat R_d = \mathcal D(\hat I, \hat R), \mathcal D'(\hat R, \hat I)$$
# A linear layer first brings $\hat I$ and $\hat R$ to {{ D }} numbers a row. Then come
# {{ len(decoder_layers) }} layers of *cross-attention*: queries from one side, keys and values from
# the other. Patches gather from descriptors while descriptors gather from patches.
# {{ excerpt("model.Decoder.forward") }}
# %% layers.png: The maps of an unseen and a seen class after each layer of the decoder
def map_after(layer, c):  # Eq. 8 for what the decoder has after this layer
    values = segmentation_map(*(calls[0][1] for calls in layer), M)[0, c].view(8, 8)
    return heat(values, values.min(), values.max())
draw.grid([[map_after(layer, c) for layer in decoder_layers] for c in (rug, seen_rug)],
          [f"after layer {number}" for number in (1, 2, 3)],
          note=f"above: {names[rug]}*; below: {names[seen_rug]}")
# %% [markdown]
# Violet is each map's lowest value, yellow its highest. One layer finds the place, two correct it.
# **Try it.** Put 19 for `rug`, a class that is not in the scene: its map has no rug's shape.
# ### Eq. 8: the maps
# $$\mathrm{Output}_i = \hat R_d \hat I_d^\top \quad \mathrm{for\ all}\ i$$
# A patch's value for a class is the dot product of the patch's row and the descriptor's row. A
# class has {{ M }} descriptors, one for each region, hence {{ M }} maps. Their mean is the output.
# {{ excerpt("model.segmentation_map") }}
# %% maps.png: The maps of all regions, their mean, and the score of each pixel
maps = R_d.unflatten(1, (M, C))[0] @ I_d[0].T  # (M, C, N): each region's map of each class
assert torch.allclose(maps.mean(0), segmentation_map(I_d, R_d, M)[0], atol=1e-4)
def row_of_maps(c):
    *tiles, mean = (heat(each.view(8, 8), -12, 4) for each in [*maps[:, c], maps[:, c].mean(0)])
    tiles = [[each.resize((80, 80)) for each in tiles[i:i + m]] for i in range(0, M, m)]
    return draw.grid(tiles), mean, heat(logits[0, c].sigmoid())
draw.grid([row_of_maps(seen_rug), row_of_maps(rug)],
          ["each region's map", "their mean", "score, 0 to 1"],
          note=f"above: {names[seen_rug]}; below: {names[rug]}*")
# %% [markdown]
# The mean map is enlarged to the image's size, and the sigmoid, $1 / (1 + e^{-x})$, makes it a
# score from 0 to 1. The unseen rug scores {{ logits[0, rug].sigmoid().max():.2f}} at best, the seen
# one {{ logits[0, seen_rug].sigmoid().max():.2f}}. The place is right, the score is low: see 4.3.
# **Try it.** `segmentation_map(I_d, R_d[:, 8 * C:9 * C], 1)` is what region 8 alone would say.
# ### Eq. 9 and 10: recovery
# $$\hat I_r, \hat R_r = \mathcal{RD}(\hat I_d, \hat R_d), \mathcal{RD}'(\hat R_d, \hat I_d)$$
# $$\mathcal L_\mathrm{recovery} = \sum_i |\hat I_{ri} - I_i| + \sum_i |\hat R_{ri} - \hat R_i|$$
# The decoder is trained on {{ len(seen) }} classes. It could please them by throwing away all that
# does not tell these {{ len(seen) }} apart, and with it what an unseen class needs. So a second
# decoder, used in training only, tries to get back from its output what CLIP had given.
# The **recovery loss** compares its results with the originals: $\hat I_r$ with $I$, CLIP's patch
# features, and $\hat R_r$ with $\hat R$, the descriptors. What is gone cannot be recovered.
# {{ excerpt("model.RecoveryDecoder.forward") }}
# {{ excerpt("model.recovery_losses") }}
# %%
I_r, R_r = model.recovery(I_d, R_d)
ours, originals = (I_r, *R_r.split(D, -1)), (I, *R_hat.flatten(1, 2).split(D, -1))
for title, recovered, original in zip(("I", "T * R_a", "T"), ours, originals):
    error, size = (recovered - original).abs().mean(), original.abs().mean()
    print(f"{title:<8} missed by {error:.4f} in the mean, and of mean size {size:.4f}")
# %% recovered.png: The patch features from CLIP, after the decoder, and recovered
draw.grid([[colours(I[0]), colours(I_d[0]), colours(I_r[0], I[0])]],
          ["I, from CLIP", "after the decoder", "recovered"])
# %% [markdown]
# The decoder's features lie in other directions than CLIP's: the mean cosine of the two is
# {{ abs(F.cosine_similarity(I_d, I, dim=-1).mean()):.2f}}. Yet $I$ and the names $T$ come back
# nearly whole. The products $T \odot R_a$ do not: they are so small that the loss ignores them.
# **Try it.** `model.recovery(I_d.flip(1), R_d)` starts from the wrong patches, and $I$ is missed.
# ## 3.5 The loss
# $$\mathcal L = \alpha \cdot \mathcal L_\mathrm{NEL} + \beta \cdot \mathcal L_\mathrm{recovery}$$
# The *non-mutually exclusive loss* (NEL) asks about each class by itself: does this pixel show a
# plain blue rug? Classes do not compete, as in a softmax, so names can be added later. The paper
# writes binary cross entropy. The released code adds the **dice** loss, for overlap, to the
# **focal** loss: cross entropy times $(1 - p_t)^2$, where $p_t$ is the probability of the right
# answer. The factor mutes what is answered well.
# {{ excerpt("model.nel_losses", "classes =", "focal =") }}
# In training, the {{ names[rug] }} and the floor are "no" for each of the {{ len(seen) }} names:
# %%
shown = data.seen_classes(dataset).shown  # class number -> number among the seen ones, or IGNORE
seen_label = torch.from_numpy(shown[label.numpy()])[None]  # (1, 64, 64)
x = model(images, T[seen])  # (1, 15, 64, 64)
t = (seen_label == torch.arange(len(seen))[:, None, None])[None].float()  # the same shape
entropy = F.binary_cross_entropy_with_logits(x, t, reduction="none")
p_t = (x * (2 * t - 1)).sigmoid()  # the probability of the right answer
focal = (0.25 * t + 0.75 * (1 - t)) * (1 - p_t)**2 * entropy
pairs = t.amax((2, 3)).sum()  # how many of the classes are in the image
assert torch.allclose(focal.mean((2, 3)).sum() / pairs, nel_losses(x, seen_label)[0])
for title, values in (("cross entropy", entropy), ("focal loss", focal)):
    pixels = values.sum(1).flatten().sort(descending=True).values
    print(f"{title:<14} {pixels[:205].sum() / pixels.sum():.0%} of it from 5% of the pixels")
# %% focal.png: Where cross entropy and the focal loss are large
sums = [values.sum(1)[0].sqrt() for values in (entropy, focal)]  # over the classes, (64, 64)
draw.grid([[labelled(given), *(heat(each, 0, each.max()) for each in sums)]],
          ["mask for training", "cross entropy", "focal loss"])
# %% [markdown]
# Cross entropy keeps working on whole rugs, the focal loss on edges. (Colours show square roots.)
# **Try it.** Write `** 0` for `** 2` in `focal`: it then looks where cross entropy does.
# ## 4.3 Testing
# ### Windows
# Over an image larger than those of training the released code moves a window, and takes the mean
# of the scores where windows overlap. Let us lay our scene beside another one.
# {{ excerpt("eval.slide_inference") }}
# %%
other, other_label = data.read_pair(dataset, 165)
wide = normalise(np.concatenate([scene, other], 1))  # (3, 64, 128)
wide_label = torch.cat([label, torch.from_numpy(other_label)], 1)
print("(top, left) of each window:", window_corners(64, 128, 64, 53))
# %% [markdown]
# **Try it.** With `stride=16` there are {{ len(window_corners(64, 128, 64, 16)) }} windows.
# ### Why 0.1 is taken off
# Training leaves a bias. The {{ len(seen) }} seen names have been the right answer thousands of
# times, the unseen ones never. Where both could be meant, the seen name wins. On the
# {{ names[rug] }}, "{{ names[rival] }}" (seen) scores {{ rug_mean[rival]:.2f}} on average, the true
# name {{ rug_mean[rug]:.2f}}. So the released code takes {{ LOWER }} off every seen class's score
# before the largest one wins, if training knew no unseen names. (The paper does not say so.)
# %%
plain = slide_inference(model, images, T, 64, 53)  # (C, 64, 64)
rug_mean = plain[:, label == rug].mean(1)  # (C): each name's mean score on the unseen rug
rival = max(seen, key=lambda c: rug_mean[c])
for lower in (0, LOWER, 0.5):
    right = label_map(plain, label.shape, seen, lower)[0] == label
    print(f"{lower:<3} off: {right[label == rug].float().mean():4.0%} of the unseen rug right, "
          f"{right[given != IGNORE].float().mean():4.0%} of the seen ones")
# %% lowered.png: The same scene without and with 0.1 taken off the seen classes
draw.grid([[labelled(plain.argmax(0)), labelled(answer),
            draw.right_and_wrong(scene, answer.numpy(), label.numpy(), 384)]],
          ["nothing taken off", "0.1 taken off", "right and wrong"])
# %% [markdown]
# **Try it.** Take 1 off: only unseen names are left. The number is a balance between the two kinds.
# ### Eq. 12: the harmonic mean
# $$\mathrm{hIoU} = \frac{2 \cdot S \cdot U}{S + U}$$
# A *confusion matrix* counts pixels: rows say what they are, columns, in the same order, what they
# were called. To keep it small, let only the four classes of the wide image compete:
# %%
four = wide_label[wide_label != IGNORE].unique().tolist()
scores = slide_inference(model, wide, T, 64, 53)[four]  # (4, 64, 128)
found, _ = label_map(scores, wide_label.shape, [i for i in range(4) if four[i] in seen], LOWER)
number = torch.full((256,), IGNORE).index_copy(0, torch.tensor(four), torch.arange(4))
matrix = confusion_matrix(found, number[wide_label.long()], 4)
for c, counts in zip(four, matrix.tolist()):
    print(f"{names[c]:<20}", *(f"{count:4}" for count in counts))
k, IoU = four.index(rug), 100 * class_iou(matrix)
S, U = (IoU.sum() - IoU[k]) / 3, IoU[k]
assert abs(2 * S * U / (S + U) - zero_shot_metrics(matrix, [k])["hIoU"]) < 1e-9
print(f"mIoU(S) {S:.1f}  mIoU(U) {U:.1f}  hIoU {2 * S * U / (S + U):.1f}")
# %% [markdown]
# The *intersection over union* (IoU) of a class divides the pixels that are it and were called it
# by those that are it or were called it. For the {{ names[rug] }} that is {{ matrix[k, k] }} /
# ({{ matrix[k].sum() }} + {{ matrix[:, k].sum() }} - {{ matrix[k, k] }}) = {{ IoU[k]:.1f}}%. $S$,
# or mIoU(S), is the mean over seen classes, $U$ over unseen ones. hIoU stays near the smaller.
# **Try it.** Replace `LOWER` by 0 in that cell: mIoU(U) falls, and hIoU falls with it.
# ### The three settings
# What may training know of the unseen classes? *Inductive*: nothing; their pixels are blank and
# their names missing ([data.py](../data.py), `seen_classes`). *Transductive*: their names, and
# which pixels belong to any of them. At every step such a pixel takes the unseen class that now
# scores highest there. *Fully supervised*: everything.
# {{ excerpt("model.pseudo_labels") }}
# %% settings.png: What one mask becomes in the three settings
pseudo = pseudo_labels(logits, label[None].long(), unseen)[0]
draw.grid([[labelled(given), labelled(pseudo), labelled(label)]],
          ["inductive", "transductive", "fully supervised"],
          note="* one of the classes that inductive training must not see")
# %% [markdown]
# **Try it.** `pseudo[label == rug].bincount()` counts the labels that the model gives itself.
