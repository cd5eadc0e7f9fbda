"""What CLIP-RC costs: the paper's GFLOPs column (Table 6) counted again.

    python bench.py gflops         multiply-adds of a forward pass, ours beside the paper's, for 1 to 1,024 region tokens
"""

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from model import CLIPRC, clip

PAPER_GFLOPS = {1: 119.8, 4: 121.2, 16: 126.7, 64: 148.9, 256: 238.2, 1024: 609.2}  # Table 6, by region tokens


def gflops(regions: int, size: int = 512, classes: int = 20) -> float:
    """Table 6's GFLOPs: 10^9 multiply-adds of one image's forward pass at ViT-B/16's size, attention included.

    Counted on the meta device, which computes shapes only: there attention is spelled out as matrix products.
    """
    with torch.device("meta"):
        model = CLIPRC(clip.model.VisionTransformer(224, 16, 768, 12, 12, 512), regions=regions).eval().requires_grad_(False)
        image, text = torch.empty(1, 3, size, size), torch.empty(classes, 512)
        with FlopCounterMode(display=False) as counter:
            model(image, text)
    return counter.get_total_flops() / 2 / 1e9  # the counter counts a multiply-add as two


def main() -> None:
    """Prints the table that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("gflops",), help="which table")
    parser.parse_args()
    print("region tokens   paper   ours   ratio      (10^9 multiply-adds, 512x512, 20 classes, ViT-B/16)")
    for regions, paper in PAPER_GFLOPS.items():
        ours = gflops(regions)
        print(f"{regions:>13}{paper:>8.1f}{ours:>7.1f}{ours / paper:>8.3f}")


if __name__ == "__main__":
    main()
