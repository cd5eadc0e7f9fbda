"""Data sets and CLIP arrive whole, from addresses that break, move or have something else."""

import hashlib
import http.server
import io
import tarfile
import threading
import zipfile

import numpy as np
import pytest
from conftest import ROOT, write_clip
from PIL import Image

from tools import get
from util.class_names import CONTEXT
from util.clip_files import clip_digest, load_clip

PASCAL = np.resize(np.arange(21, dtype=np.uint8), (5, 6))  # every class of VOC
SBD_MAT, CONTEXT_MAT = (  # by SciPy: a struct GTcls with its three fields, and a LabelMap
    (ROOT / f"tests/golden/{name}.mat").read_bytes() for name in ("sbd", "context"))
GOOD, BAD, (VOC_TAR, SBD_TGZ) = bytes(range(256)) * 30, bytes(7680), get.DATA["voc"][-2:]


def png(array: np.ndarray) -> bytes:
    Image.fromarray(array.astype(np.uint8)).save(file := io.BytesIO(), "png")
    return file.getvalue()


def archive(name: str, top: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """{name: a zip or tar file}. In `files`, "FOLDER/A B.x" stands for top/FOLDER/A.x and B.x."""
    out, zipped, mode = io.BytesIO(), name.endswith("zip"), "w:gz" if name.endswith("gz") else "w"
    with zipfile.ZipFile(out, "w") if zipped else tarfile.open(None, mode, out) as file:
        for path, content in files.items():
            folder, stems, suffix = f"{top}/{path}".replace(".", "/").rsplit("/", 2)
            for name_in in [f"{folder}/{stem}.{suffix}".strip("/") for stem in stems.split()]:
                (info := tarfile.TarInfo(name_in)).size, data = len(content), io.BytesIO(content)
                file.writestr(name_in, content) if zipped else file.addfile(info, data)
    return {name: out.getvalue()}


class Answers(http.server.BaseHTTPRequestHandler):
    """Serves web.files from where a Range begins, and breaks off after web.cuts."""

    def do_GET(self):
        web, first = self.server, self.headers["Range"][len("bytes="):-1]
        web.asked.append(f"{self.path.split('/')[1]} {first}")
        content = web.files.get(self.path, b"")[int(first) * web.ranges:]
        self.send_response(206 if content and web.ranges else 200 if content else
                           416 if web.files.get(self.path) else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:web.cuts.pop() if content and web.cuts else None])


@pytest.fixture
def web(tmp_path, monkeypatch, capsys):
    """A server on this machine. web.put: files that moved from /old to /new. web.get: the tool."""
    def put(files: dict[str, bytes], kind: str = "md5") -> None:
        for name, content in files.items():
            web.files[f"/new/{name.split('/')[-1]}"] = content
            get.FILES[name] = sites, len(content), kind and hashlib.new(kind, content).hexdigest()

    def run(*arguments, error: str | None = None) -> str:
        monkeypatch.setattr("sys.argv", ["get", *map(str, arguments)])
        with pytest.raises((OSError, ValueError), match=error) if error else monkeypatch.context():
            get.main()
        return capsys.readouterr().out

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    sites = [f"http://127.0.0.1:{web.server_port}/{folder}" for folder in ("old", "new")]
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    web.files, web.cuts, web.asked, web.ranges, web.free = {}, [], [], True, 10**12
    web.put, web.get, web.clip = put, run, tmp_path / "home/.cache/clip-rc/ViT-B-16.pt"
    web.clip.parent.mkdir(parents=True)
    web.clip.touch()
    monkeypatch.setattr(get, "FILES", {})
    monkeypatch.setattr("shutil.disk_usage", lambda _: web)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield web
    web.shutdown()


def test_voc_survives_a_moved_file_and_a_broken_connection(web, tmp_path):
    web.put(archive(VOC_TAR, "VOCdevkit/VOC2012", {
        "JPEGImages/a b c d e.jpg": png(PASCAL), "SegmentationClass/a b.png": png(PASCAL),
        "ImageSets/Segmentation/train.txt": b"a\n", "ImageSets/Segmentation/val.txt": b"b\n"}))
    web.put(archive(SBD_TGZ, "benchmark_RELEASE/dataset", {
        "cls/a b c d.mat": SBD_MAT, "train.txt": b"a\nc\n", "val.txt": b"b\nd\n"}))
    web.cuts = [4000]
    (mine := tmp_path / "VOC2012/JPEGImages/c.jpg").parent.mkdir(parents=True)
    mine.write_bytes(png(PASCAL) + b"mine")
    out = web.get("voc", tmp_path)
    assert web.asked == ["old 0", "new 0", "new 3999", "old 0", "new 0"]
    assert sorted(file.stem for file in tmp_path.glob("VOC2012/*/?.*")) == [*"aabbccdd"]
    mask = Image.open(tmp_path / "VOC2012/SegmentationClassAug/c.png")
    assert (np.array(mask) == PASCAL).all() and mask.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
    assert "3 images; the paper has 10,582" in out and f"--data-root {tmp_path}/VOC2012" in out
    given, asked = (tmp_path / "archives").rename(tmp_path / "given"), len(web.asked)
    for place, *more in ((tmp_path,), (tmp_path / "2", "--from", *given.iterdir())):
        assert "nothing wrong" in web.get("voc", place, *more)
    assert len(web.asked) == asked and mine.read_bytes().endswith(b"mine")


@pytest.mark.parametrize("partial, old, ranges", [
    (GOOD[:999], b"", False), (GOOD, b"", True), (BAD[:999], b"", True), (b"", BAD, True)])
def test_a_file_comes_whole_whatever_is_here_or_there(partial, old, ranges, web, tmp_path):
    web.put({"labels.txt": GOOD})
    web.files["/old/labels.txt"], web.ranges, path = old, ranges, tmp_path / "labels.txt"
    path.with_suffix(".txt.partial").write_bytes(partial)
    assert get.obtain("labels.txt", path).read_bytes() == GOOD and len(web.asked) < 4
    path.unlink()
    web.files = dict.fromkeys(web.files, BAD)
    with pytest.raises(ValueError, match=f"7,680 bytes, .* put it at {path}"):
        get.obtain("labels.txt", path)
    assert not list(tmp_path.glob("labels*"))


def test_coco_stuff_is_unpacked_and_context_has_59_classes_and_background(web, tmp_path):
    values = {*range(182)} - {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
    image, (train, val, maps) = png(np.array([*values]).reshape(9, 19)), get.DATA["coco-stuff"][-3:]
    web.put(archive(train, "train2017", {"1 2.jpg": image}) | archive(val, "val2017", {
        "3.jpg": image}) | archive(maps, "", {"train2017/1 2.png": image, "val2017/3.png": image}))
    assert "train: 2 images" in (out := web.get("coco-stuff", tmp_path)) and "nothing wrong" in out
    names = {3 + 7 * i: name.replace("tv", "tv ") for i, name in enumerate(CONTEXT[1:])}
    voc, mats, labels = get.DATA["context"][-3:]
    web.put(archive(mats, "trainval", {"a b.mat": CONTEXT_MAT}))
    web.put(archive(voc, "VOCdevkit/VOC2010", {
        "JPEGImages/a b c.jpg": png(np.zeros((4, 16))), "ImageSets/Main/boat_train.txt": b"a -1\n",
        "ImageSets/Main/train.txt": b"a\nc\n", "ImageSets/Main/val.txt": b"b\n"}))
    web.put({labels: "\n".join(f"{i}: {names.get(i)}" for i in range(1, 460)).encode()})
    assert "train.txt: 1 images, -4,995 against the paper" in web.get("context", tmp_path)
    mask = np.array(Image.open(tmp_path / "VOC2010/SegmentationClassContext/a.png"))
    assert mask.ravel().tolist() == [*range(1, 60), 0, 0, 0, 0, 0]


def test_clip_comes_from_the_cache_or_openai_or_else_from_hugging_face(web, clip_path, tmp_path):
    cached, digest = web.clip.parents[1] / "clip/ViT-B-16.pt", clip_digest(load_clip(clip_path))
    cached.parent.mkdir()
    web.put({cached.name: clip_path.read_bytes()}, "sha256")
    for content, asked in ((clip_path.read_bytes(), 0), (b"another file", 2)):
        cached.write_bytes(content)
        web.clip.unlink()
        web.get("clip")
        assert clip_digest(load_clip("ViT-B/16")) == digest and len(web.asked) == asked
    cached.parents[1].rename(tmp_path / "gone")
    write_clip("hugging_face_quick_gelu", hub := tmp_path / "hub")
    web.put({f"ViT-B-16/{file.name}": file.read_bytes() for file in hub.iterdir()}, "")
    web.files = {path: web.files[path] for path in web.files if not path.endswith(".pt")}
    assert "Hugging Face's form" in web.get("clip", "ViT-B/16") and load_clip("ViT-B/16")
