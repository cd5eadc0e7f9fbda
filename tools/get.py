"""Fetch a data set (paper Sec. 4.1) or CLIP (Sec. 4.2) and write it in the form that is read here.

    python -m tools.get voc|context|coco-stuff [FOLDER]   into FOLDER, data by default, and CLIP
    python -m tools.get clip [NAME]                       ViT-B/16 by default, to ~/.cache/clip-rc
    python -m tools.get voc --from FILE ...               with archives that are on the disk

The same command continues what was interrupted. No file is overwritten.
"""

import argparse
import errno
import hashlib
import shutil
import tarfile
import zlib
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen
from zipfile import BadZipFile, ZipFile

import numpy as np

from data import read_names
from tools import check_data, convert_clip
from tools.matlab import matlab_mask
from util.class_names import CONTEXT
from util.clip_files import NAMES
from util.images import save_image
from util.processes import progress, run_script

VOC_SITES = "https://thor.robots.ox.ac.uk/pascal/VOC", "http://host.robots.ox.ac.uk/pascal/VOC"
SBD_SITE = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours"
COCO, CONTEXT_SITE = "http://images.cocodataset.org/zips", "https://roozbehm.info/pascal-context"
STUFF_SITE = "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset"
OPENAI, HUB = "https://openaipublic.azureedge.net/clip/models", "https://huggingface.co/openai"
FILES = {  # folders on the web, in the order of trying; bytes, a float if about; MD5 or SHA-256
    "VOCtrainval_11-May-2012.tar": ([f"{site}/voc2012" for site in VOC_SITES], 1_999_639_040,
                                    "6cd6e144f989b92b3379bac3b3de84fd"),
    "VOCtrainval_03-May-2010.tar": ([f"{site}/voc2010" for site in VOC_SITES], 1.3e9,
                                    "da459979d0c395079b5c75ee67908abb"),
    "benchmark.tgz": ([SBD_SITE], 1_419_539_633, "82b4d87ceb2ed10f6038a1cba92111cb"),
    "trainval.tar.gz": ([CONTEXT_SITE], 31e6, None), "labels.txt": ([CONTEXT_SITE], 7e3, None),
    "train2017.zip": ([COCO], 19.3e9, "cced6f7f71b7629ddf16f17bbcfab6b2"),
    "val2017.zip": ([COCO], 0.8e9, "442b8da7639aecaf257c1dceb8ba8c80"),
    "stuffthingmaps_trainval2017.zip": ([STUFF_SITE], 0.7e9, None)}
CLIPS = {  # Hugging Face's names of the four CLIPs; the SHA-256 of OpenAI's files
    "base-patch32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "base-patch16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "large-patch14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "large-patch14-336": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"}
for name, (model, sha256) in zip(NAMES, CLIPS.items()):
    clip, size = name.replace("/", "-").replace("@", "-"), 0.35e9 if "base" in model else 0.93e9
    FILES[f"{clip}.pt"] = [f"{OPENAI}/{sha256}"], size, sha256
    for file, about in (("config.json", 5e3), ("pytorch_model.bin", 1.8 * size)):
        FILES[f"{clip}/{file}"] = [f"{HUB}/clip-vit-{model}/resolve/main"], about, None
DATA = {  # folder, what is written last in it, bytes when unpacked, terms of use, archives
    "voc": ("VOC2012", "ImageSets/Segmentation/trainaug.txt", 1.5e9,
            "images: Flickr's; masks: SBD names none, cite Hariharan et al. 2011",
            "VOCtrainval_11-May-2012.tar", "benchmark.tgz"),
    "context": ("VOC2010", "ImageSets/SegmentationContext/val.txt", 1.3e9,
                "images: Flickr's; masks: none named, cite Mottaghi et al. 2014",
                "VOCtrainval_03-May-2010.tar", "trainval.tar.gz", "labels.txt"),
    "coco-stuff": ("coco_stuff164k", ".complete", 21.5e9, "images: Flickr's; masks: CC BY 4.0",
                   "train2017.zip", "val2017.zip", "stuffthingmaps_trainval2017.zip")}
SPLITS, BROKEN = ("train", "val"), (EOFError, TimeoutError, ConnectionError, HTTPException)


def check(path: Path, checksum: str | None) -> Path:
    """The path of a file. Raises ValueError if the published file has another checksum."""
    kind = "md5" if len(checksum or "") == 32 else "sha256"
    with open(path, "rb") as file:
        if checksum and (found := hashlib.file_digest(file, kind).hexdigest()) != checksum:
            raise ValueError(f"{path}: its {kind} is {found}, not {checksum}: remove it")
    return path


def obtain(name: str, path: Path) -> Path:
    """The path of one of FILES, checked, and fetched from the first address that works."""
    (sites, size, checksum), partial = FILES[name], path.with_name(f"{path.name}.partial")
    if path.exists():
        return check(path, checksum)
    path.parent.mkdir(parents=True, exist_ok=True)
    urls = [f"{site}/{path.name}" for site in sites for _ in range(4)]
    while urls:
        url = urls.pop(0)
        # The last byte comes twice, as a server refuses the range after the end of a whole file.
        start = have = max(0, partial.stat().st_size - 1) if partial.exists() else 0
        print(f"  {url}" + f" from byte {start:,}" * bool(start), flush=True)
        request = Request(url, headers={"Range": f"bytes={start}-", "User-Agent": "clip-rc"})
        try:
            with urlopen(request, timeout=60) as answer, open(partial, "ab") as file:
                have *= answer.status == 206  # any other answer is the whole file
                total, kind = have + (answer.length or 0), answer.headers.get_content_type()
                if kind == "text/html" or isinstance(size, int) and size != total > have:
                    raise OSError(f"it has another file: {kind}, {total:,} bytes")
                file.truncate(have)
                blocks, rest = iter(lambda: answer.read(2**20), b""), (total or size) - have
                for block in progress(blocks, f"  {path.name}, MiB", 1 + int(rest / 2**20)):
                    have += file.write(block)
            if have < total:
                raise EOFError(f"the connection broke after {have:,} of {total:,} bytes")
            return check(partial, checksum).rename(path)
        except (OSError, ValueError, *BROKEN) as error:
            if getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT):
                raise
            print(f"  {url}: {' '.join(str(error).split()) or type(error).__name__}", flush=True)
            if isinstance(error, ValueError) or getattr(error, "code", 0) == 416:
                partial.unlink(missing_ok=True)  # wrong bytes, or too many
            if not (isinstance(error, BROKEN) or start and not partial.exists()):
                urls = [other for other in urls if other != url]
    raise ValueError(f"{name}: no address works; fetch it elsewhere ({size:,.0f} bytes, checksum "
                     f"{checksum or 'unknown'}) and put it at {path}")


def unpack(archive: Path, pattern: str, folder: Path, names=None, convert=None) -> None:
    """Write an archive's files whose paths end like the pattern into a folder. names: the stems to
    take; each must be there. convert: makes an image of a file's bytes, to be written as a PNG."""
    zipped, suffix = archive.suffix == ".zip", ".png" if convert else Path(pattern).suffix
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (ZipFile if zipped else tarfile.open)(archive) as file:
            infos = {path.stem: info for info in (file.infolist() if zipped else file)
                     if (path := Path(info.filename if zipped else info.name)).match(pattern)
                     and (names is None or path.stem in names)}
            if missing := set(names or ()) - infos.keys():
                raise ValueError(f"it lacks {len(missing):,} of {pattern}, such as {min(missing)}")
            for stem, info in progress(infos.items(), f"  {folder}", len(infos)):
                if (path := folder / f"{stem}{suffix}").exists():
                    continue
                content = file.read(info) if zipped else file.extractfile(info).read()
                if convert:
                    save_image(convert(content), path)
                else:
                    path.with_suffix(".partial").write_bytes(content)
                    path.with_suffix(".partial").rename(path)
    except (OSError, ValueError, EOFError, zlib.error, tarfile.TarError, BadZipFile) as error:
        raise ValueError(f"{archive}: {error}") from error


def get_voc(root: Path, voc: Path, sbd: Path) -> None:
    """VOC 2012, and what SBD's two lists add to VOC's."""
    lists, more_lists = root / "ImageSets/Segmentation", root / "ImageSets/SBD"
    unpack(voc, "VOC2012/ImageSets/Segmentation/*.txt", lists, SPLITS)
    unpack(sbd, "dataset/*.txt", more_lists, SPLITS)
    train, val, *more = (read_names(folder / f"{split}.txt")
                         for folder in (lists, more_lists) for split in SPLITS)
    own = {*train, *val}
    more = [name for names in more for name in names if name not in own]
    unpack(voc, "VOC2012/JPEGImages/*.jpg", root / "JPEGImages", own.union(more))
    unpack(voc, "VOC2012/SegmentationClass/*.png", root / "SegmentationClass", own)
    unpack(sbd, "dataset/cls/*.mat", root / "SegmentationClassAug", set(more), lambda content:
           matlab_mask(content, np.arange(256, dtype=np.uint8), b"Segmentation"))
    (lists / "trainaug.txt").write_text("\n".join(train + more))
    print(f"trainaug.txt: {len(train + more):,} images; the paper has 10,582")


def get_context(root: Path, voc: Path, annotations: Path, label_list: Path) -> None:
    """VOC 2010's images, and Context's masks of 459 labels reduced to 59 classes and background."""
    lines = [line.partition(":") for line in label_list.read_text().splitlines()]
    labels = {"".join(name.split()): int(number) for number, _, name in lines if name}
    if unknown := set(CONTEXT[1:]) - set(labels):
        raise ValueError(f"{label_list}: lacks {', '.join(unknown)}; is it Context's labels.txt?")
    mapping = np.zeros(1 << 16, np.uint8)  # all other values are background
    mapping[[labels[name] for name in CONTEXT[1:]]] = range(1, 60)
    masks, lists = root / "SegmentationClassContext", root / "ImageSets/SegmentationContext"
    unpack(annotations, "trainval/*.mat", masks, None, lambda data: matlab_mask(data, mapping))
    unpack(voc, "VOC2010/ImageSets/Main/*.txt", lists / "Main", SPLITS)
    for split, paper in zip(SPLITS, (4_996, 5_104)):
        names = [name for name in read_names(lists / f"Main/{split}.txt")
                 if (masks / f"{name}.png").exists()]
        unpack(voc, "VOC2010/JPEGImages/*.jpg", root / "JPEGImages", set(names))
        (lists / f"{split}.txt").write_text("\n".join(names))
        print(f"{split}.txt: {len(names):,} images, {len(names) - paper:+,} against the paper")


def get_coco_stuff(root: Path, train: Path, val: Path, maps: Path) -> None:
    """The images and the raw maps of both splits."""
    for archive, split in ((train, "train2017"), (val, "val2017")):
        unpack(archive, f"{split}/*.jpg", root / "images" / split)
        unpack(maps, f"{split}/*.png", root / "annotations" / split)


def plan(files: dict[str, Path], folder: Path, needed: float) -> None:
    """Say what is there, what will be fetched and how much disk it needs, which must be free."""
    for name, path in files.items():
        (sites, size, _), partial = FILES[name], path.with_name(f"{path.name}.partial")
        have = size if path.exists() else partial.stat().st_size if partial.exists() else 0
        print(f"  {path} has {have:,.0f} of {size:,.0f} bytes", *sites[:have < size], sep="; from ")
        needed += size - have
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    print(f"  {folder}: {needed / 1e9:.1f} GB more are needed, {free / 1e9:.1f} GB are free")
    if needed > free:
        raise ValueError(f"{folder}: {(needed - free) / 1e9:.1f} GB more must be free on its disk")


def get_clip(name: str, given: dict[str, Path]) -> None:
    """Write CLIP's file to ~/.cache/clip-rc: from a given one, OpenAI's own cache or the web."""
    if name not in NAMES:
        raise ValueError(f"{name} is not known here; choose from {', '.join(NAMES)}")
    clip = name.replace("/", "-").replace("@", "-")
    try:
        out = Path.home() / f".cache/clip-rc/{clip}.pt"
        if out.exists():
            return print(f"  {out}: there")
        file, folder, cached = out.name, out.parent / "download", out.parents[1] / "clip" / out.name
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows the home
        raise ValueError(f"{name} cannot be kept in ~/.cache/clip-rc ({error}); set HOME to a "
                         "folder of yours, or run python -m tools.convert_clip FILE OUT.pt")
    ways = [{file: given[file]}] if file in given else [
        *[{file: cached}] * cached.exists(), {file: folder / file},
        {f"{clip}/{part}": folder / clip / part for part in ("config.json", "pytorch_model.bin")}]
    plan(ways[0], out.parent, 0.7e9)
    for way in ways:
        try:
            *_, source = [obtain(*each) for each in way.items()]
            return convert_clip.convert(source, out)
        except ValueError as error:
            print(f"  {error}")
    raise ValueError(f"{name}: no weights, see above; fetch {file} elsewhere (SHA-256 "
                     f"{FILES[file][2]}) and give it: --from {file}")


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("what", choices=(*DATA, "clip"))
    parser.add_argument("place", nargs="?", metavar="FOLDER or NAME")
    parser.add_argument("--from", dest="given", nargs="+", default=[], type=Path, metavar="FILE")
    args = parser.parse_args()
    given = {path.name: path.expanduser() for path in args.given}
    for path in given.values():
        if path.name not in FILES or not path.is_file():
            raise ValueError(f"--from {path}: no file, or none that is called {', '.join(FILES)}")
    if args.what == "clip":
        return get_clip(args.place or "ViT-B/16", given)
    place, last, size, terms, *names = DATA[args.what]
    root = (folder := Path(args.place or "data").expanduser()) / place
    get = {"voc": get_voc, "context": get_context, "coco-stuff": get_coco_stuff}[args.what]
    print(f"{args.what}, and CLIP's ViT-B/16. Terms of use: {terms}")
    if not (root / last).exists():
        files = {name: given.get(name, folder / "archives" / name) for name in names}
        plan(files, folder, size - sum(f.stat().st_size for f in root.rglob("*") if f.is_file()))
        get(root, *[obtain(*each) for each in files.items()])
        (root / last).touch()
    try:
        get_clip("ViT-B/16", given)
    finally:  # the data set is there all the same
        problems, warnings = map(check_data.by_kind, check_data.check(args.what, root))
        print(*(f"warning: {line}" for line in warnings), *problems or ["nothing wrong"], sep="\n")
        flags = f"--dataset {args.what} --data-root {root}"
        print(f"next: python eval.py --untrained {flags}\nthen: python train.py {flags}")
    if problems:
        raise ValueError(f"{root} cannot be used yet, see above")


if __name__ == "__main__":
    run_script(main)
