"""Tests that exports of annotation tools become folders whose masks are those of the tools."""

import json
import pathlib
import re
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from dense_jax import train
from dense_jax.data import convert, doctor, formats, open_dataset
from dense_jax.data.formats import FORMATS, export, labelme
from dense_jax.labels import IGNORE_LABEL
from experiments import base
from tests import forked
from tests.conftest import REPOSITORY

pytestmark = [
    pytest.mark.usefixtures("shared_programs"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept"),  # pycocotools
]

GOLDEN = REPOSITORY / "tests" / "data" / "golden"
CLASSES = ["background", "cell", "fiber", "nucleus"]
SPLITS = {"train": ["a", "b", "c", "d"], "val": ["e"], "test": ["f"]}
NAMES = [name for names in SPLITS.values() for name in names]
SIZE = 12, 16


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path, **options)


def tree(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def box(rows, columns):
    mask = np.zeros(SIZE, bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


RING = box((1, 8), (1, 8)) & ~box((3, 6), (3, 6))
MASKS = {  # of each image, lowest first: (class, pixels)
    "crowd": box((0, 12), (6, 16)),
    "cell": RING,
    "fiber": box((4, 5), (0, 16)),
    "nucleus": box((8, 12), (9, 14)),
}


@pytest.fixture
def photos(tmp_path):
    """Six images and the lists of their splits."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        save(tmp_path / "photos" / f"{name}.png", rng.integers(0, 256, (*SIZE, 3), "uint8"))
    for split, names in SPLITS.items():
        (tmp_path / "lists").mkdir(exist_ok=True)
        (tmp_path / "lists" / f"{split}.txt").write_text("\n".join(names))
    return tmp_path / "photos"


def painted(masks, classes, rest=0, objects=True):
    """A label and its objects, from (class, pixels) of each object, lowest first."""
    label, numbers = np.full(SIZE, rest, int), np.zeros(SIZE, int)
    for i, (name, mask) in enumerate(masks, start=1):
        label[mask] = IGNORE_LABEL if name == "crowd" else classes.index(name)
        numbers[mask] = 0 if name == "crowd" or not objects else i
    return label, numbers


def run_lengths(mask):
    """COCO's uncompressed run lengths: columns after each other, beginning with zeros."""
    flat = [0, *mask.T.ravel().astype(int), 2]
    edges = np.flatnonzero(np.diff(flat)).tolist()
    return np.diff([0, *edges]).tolist()


def coco(folder, photos):
    """Polygons, both kinds of run lengths, an overlap, a hole and a crowd. The masks are those of
    pycocotools."""
    mask_tools = pytest.importorskip("pycocotools.mask")
    from pycocotools.coco import COCO

    packed = mask_tools.encode(np.asfortranarray(MASKS["fiber"], np.uint8))
    segmentations = [
        ("cell", [[1.2, 1.0, 7.6, 1.4, 7.0, 7.5, 1.5, 7.1], [9.5, 1.0, 13.0, 1.5, 11.2, 3.9]]),
        ("nucleus", {"size": SIZE, "counts": run_lengths(RING)}),
        ("fiber", packed | {"counts": packed["counts"].decode()}),
        ("crowd", {"size": SIZE, "counts": run_lengths(MASKS["crowd"])}),
    ]
    ids = {"nucleus": 90, "cell": 3, "fiber": 7}
    table = {
        "images": [
            {"id": i, "file_name": f"{name}.png", "height": SIZE[0], "width": SIZE[1]}
            for i, name in enumerate(NAMES)
        ],
        "categories": [{"id": ids[name], "name": name} for name in CLASSES[1:]],
        "annotations": [
            {
                "id": 100 * i + j,
                "image_id": i,
                "category_id": ids.get(name, 3),
                "segmentation": segmentation,
                "iscrowd": int(name == "crowd"),
            }
            for i in range(len(NAMES))
            for j, (name, segmentation) in enumerate(segmentations)
        ],
    }
    path = folder / "coco.json"
    path.write_text(json.dumps(table))
    tool = COCO(str(path))
    masks = [tool.annToMask(tool.anns[j]).astype(bool) for j in range(4)]
    assert not masks[1][4, 4] and masks[1].sum() == RING.sum()
    layers = [("crowd", masks[3]), *zip(("cell", "nucleus", "fiber"), masks[:3], strict=True)]
    given = {"annotations": str(path), "images": str(photos)}
    return "coco", given, *painted(layers, CLASSES)


def panoptic(folder, photos):
    """Segments in the colors of a PNG file, of which one is stuff, and pixels of no segment."""
    classes = ["sky", "cell", "fiber", "nucleus"]
    ids = {"sky": 5, "cell": 70_000, "fiber": 300, "nucleus": 8}
    table = {"images": [], "annotations": [], "categories": []}
    for i, name in enumerate(classes):
        table["categories"].append({"id": 10 * i, "name": name, "isthing": int(name != "sky")})
    layers = [("sky", box((0, 11), (0, 16))), *list(MASKS.items())[1:]]
    label, numbers = painted(layers, classes, IGNORE_LABEL)
    codes = np.zeros(SIZE, int)
    for name, mask in layers:
        codes[mask] = ids[name]
    for i, name in enumerate(NAMES):
        rgb = np.stack([codes % 256, codes // 256 % 256, codes // 65536], axis=-1)
        save(folder / "panoptic" / f"{name}_p.png", rgb.astype(np.uint8))
        table["images"].append({"id": i, "file_name": f"{name}.png"})
        segments = [
            {"id": ids[n], "category_id": 10 * k, "iscrowd": 0} for k, n in enumerate(classes)
        ]
        table["annotations"].append(
            {"image_id": i, "file_name": f"{name}_p.png", "segments_info": segments}
        )
    (folder / "panoptic.json").write_text(json.dumps(table))
    given = {"annotations": str(folder / "panoptic.json"), "images": str(photos)}
    given["masks"] = str(folder / "panoptic")
    return "coco", given, label, np.where(numbers == 1, 0, numbers)


def labelme_(folder, photos):
    """All shapes. labelme 6.3.1 itself (utils.shapes_to_label) made the masks from this file."""
    table = json.loads((GOLDEN / "labelme.json").read_text())
    del table["imageData"]
    for name in NAMES:
        image = Image.open(photos / f"{name}.png").resize((64, 48))
        image.save(photos / f"{name}.png")
        about = table | {"imagePath": f"..\\photos\\{name}.png", "imageData": None}
        (folder / "shapes").mkdir(exist_ok=True)
        (folder / "shapes" / f"{name}.json").write_text(json.dumps(about))
    with np.load(GOLDEN / "labelme.npz") as golden:
        label, numbers = golden["classes"], golden["instances"]
    is_object = (label > 0) & (label < IGNORE_LABEL)
    return (
        "labelme",
        {"annotations": str(folder / "shapes")},
        label,
        np.where(is_object, numbers, 0),
    )


def colors(folder, photos):
    """Colors of which two are one class, as CVAT lists them, and an ignored one."""
    (folder / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncell:10,20,30::\n"
        "fiber:250,250,250::\nnucleus:0,0,1\n__ignore__:224,224,192::\ncell:10,20,31::\n"
    )
    label, _ = painted(MASKS.items(), CLASSES)
    rgb = np.zeros((*SIZE, 3), np.uint8)
    for value, color in [(1, (10, 20, 30)), (2, 250), (3, (0, 0, 1)), (255, (224, 224, 192))]:
        rgb[label == value] = color
    rgb[1, 1] = 10, 20, 31
    for name in NAMES:
        save(folder / "painted" / f"{name}_mask.png", rgb)
    given = {"images": str(photos), "masks": str(folder / "painted" / "NAME_mask.png")}
    return "colors", given | {"colors": str(folder / "labelmap.txt")}, label, None


def mask_of_each_class(folder, photos):
    layers = list(MASKS.items())[1:]
    for name in NAMES:
        for class_name, mask in layers:
            save(folder / "classes" / class_name / f"{name}.png", mask)
    given = {"images": str(photos), "masks": str(folder / "classes" / "CLASS" / "NAME.png")}
    return "masks", given, painted(layers, CLASSES)[0], None


def mask_of_each_object(folder, photos):
    """The objects 1 and 2 of a class overlap; transparent pixels are outside."""
    layers = list(MASKS.items())[1:]
    for name in NAMES:
        for i, (class_name, mask) in enumerate(layers):
            rgba = np.full((*SIZE, 4), 255, np.uint8)
            rgba[..., 3] = 255 * mask
            save(folder / "objects" / name / f"{i}_{class_name}.png", rgba)
    given = {"images": f"{photos}/NAME.*", "masks": f"{folder}/objects/NAME/*_CLASS.png"}
    return "masks", given, *painted(layers, CLASSES)


def mask_beside_the_image(folder, photos):
    for name in NAMES:
        save(photos / f"{name}_mask.png", RING.astype(np.uint8) * 255, bits=8)
    given = {"images": str(photos), "masks": str(photos / "NAME_mask.png")}
    return "masks", given, RING.astype(int), None


EXPORTS = {
    made.__name__: made
    for made in (
        *(coco, panoptic, labelme_, colors, mask_of_each_class, mask_of_each_object),
        mask_beside_the_image,
    )
}


@pytest.mark.parametrize("made", EXPORTS)
def test_masks_are_those_of_the_tool(made, tmp_path, photos):
    form, given, label, objects = EXPORTS[made](tmp_path, photos)
    before = tree(tmp_path)
    root = tmp_path / "root"
    report = convert.convert(FORMATS[form](**given), str(root), str(tmp_path / "lists"))
    assert {path: data for path, data in tree(tmp_path).items() if path in before} == before
    assert json.loads((root / "conversion.json").read_text()) == report
    assert "4 train, 1 val, 1 test" in report["images"] and "lists" in report["splits"]
    for split, names in SPLITS.items():
        source = open_dataset("folder", str(root), split)
        assert source.names == tuple(sorted(names))
        assert source.has_instances == (objects is not None)
        for i, example in enumerate(source):
            np.testing.assert_array_equal(example["label"], label)
            np.testing.assert_array_equal(example["image"], read(photos / f"{example['name']}.png"))
            if objects is not None:
                assert same_objects(source.instances(i), objects)
    assert not any(found["errors"] for found in doctor.examine("folder", str(root)).values())


def same_objects(ours, theirs):
    """Whether two maps have the same objects, under any numbers but for 0."""
    pairs = np.unique(np.stack([ours.ravel(), theirs.ravel()]), axis=1)
    return (pairs[:, 0] == 0).all() and len(set(pairs[0])) == len(set(pairs[1])) == pairs.shape[1]


@pytest.mark.parametrize(
    "made", [coco, panoptic, labelme_, colors, mask_of_each_class, mask_of_each_object]
)
def test_a_network_trains_on_what_was_converted(made, tmp_path, photos):
    form, given, *_ = made(tmp_path, photos)
    convert.convert(FORMATS[form](**given), str(tmp_path / "root"), str(tmp_path / "lists"))
    config = base.get_config()
    config.num_steps = config.eval_every = 2
    config.batch_size = config.eval.batch_size = 4
    config.model.widths, config.model.convs_per_level = (2, 3), 1
    config.data.name, config.data.root = "folder", str(tmp_path / "root")
    config.data.crop_size = (8, 8)
    config.optimizer.warmup_steps = 1
    train.train(config, str(tmp_path / "run"))
    assert (tmp_path / "run" / "result.json").exists()


def test_shapes_are_those_of_labelme():
    shapes = json.loads((GOLDEN / "labelme.json").read_text())["shapes"]
    drawn = [labelme.mask(s, (48, 64)) for s in shapes if s["shape_type"] != "mask"]
    with np.load(GOLDEN / "labelme.npz") as golden:
        np.testing.assert_array_equal(np.packbits(drawn), golden["masks"])


def test_an_image_inside_a_file_of_labelme_is_taken_out(tmp_path):
    shutil.copy(GOLDEN / "labelme.json", tmp_path)
    (item,) = labelme.read(str(tmp_path)).items
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.txt").write_text("labelme")
    convert.convert(labelme.read(str(tmp_path)), str(tmp_path / "root"), str(tmp_path / "lists"))
    source = open_dataset("folder", str(tmp_path / "root"), "train")
    with np.load(GOLDEN / "labelme.npz") as golden:
        np.testing.assert_array_equal(source[0]["label"], golden["classes"])
    assert source[0]["image"].shape == (48, 64, 3) and item.image.name == "labelme.png"


def test_overlaps_and_crowds_are_reported(tmp_path, photos):
    form, given, *_ = coco(tmp_path, photos)
    lists, root = str(tmp_path / "lists"), tmp_path / "root"
    report = convert.convert(FORMATS[form](**given), str(root), lists)
    shared = int(re.match(r"(\d+) pixels of 6 images", report["overlaps"])[1])
    objects = read(root / "instances" / "val" / "e.png")
    assert shared % 6 == 0 and shared / 6 >= (objects == 3)[:, 1:3].sum() > 0
    assert report["overlaps"].endswith("the later annotation in the file lies on top")
    assert report["note"].startswith("6 of 24 annotations are crowds: their pixels are ignored")
    crowds = FORMATS[form](**given, crowd="objects")
    assert "objects like others" in convert.convert(crowds, f"{root}2", lists)["note"]
    label = read(tmp_path / "root2" / "labels" / "val" / "e.png")
    assert (label[MASKS["crowd"]] == CLASSES.index("cell")).all() and 255 not in label


def test_a_restart_goes_on_where_it_stopped(tmp_path, photos, monkeypatch):
    form, given, *_ = mask_of_each_object(tmp_path, photos)
    lists, root = str(tmp_path / "lists"), tmp_path / "root"
    paint, calls = convert.paint, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return paint(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(convert, "paint", stop)
        convert.convert(FORMATS[form](**given), str(root), lists)
    done = tree(root / "labels")
    assert 0 < len(done) < 6 and not (root / "conversion.json").exists()
    half = root / "labels" / "train" / ".a.png.0123.tmp"  # of a process that was killed
    half.write_bytes(b"\x89PNG")
    times = {path: path.stat().st_mtime_ns for path in done}
    report = convert.convert(FORMATS[form](**given), str(root), lists)
    assert f"{len(done)} were complete before, 0 are made again" in report["images"]
    assert {path: path.stat().st_mtime_ns for path in done} == times
    whole = convert.convert(FORMATS[form](**given), str(tmp_path / "whole"), lists)
    assert {k: report[k] for k in whole if k != "images"} == {
        k: whole[k] for k in whole if k != "images"
    }
    half.unlink()
    assert {p.relative_to(root): data for p, data in tree(root).items() if p.suffix != ".json"} == {
        p.relative_to(tmp_path / "whole"): data
        for p, data in tree(tmp_path / "whole").items()
        if p.suffix != ".json"
    }
    # A mask that has changed is read again, and a file that is gone is made again.
    save(tmp_path / "objects" / "a" / "9_cell.png", box((0, 1), (0, 1)))
    (root / "images" / "val" / "e.png").unlink()
    report = convert.convert(FORMATS[form](**given), str(root), lists)
    assert "4 were complete before, 2 are made again" in report["images"]
    assert read(root / "labels" / "train" / "a.png")[0, 0] == 1
    assert (root / "images" / "val" / "e.png").exists()


def test_splits_are_a_function_of_the_group_alone():
    items = [
        export.Item(None, f"p{i // 3}_{i}", pathlib.Path(f"{i}.png"), lambda shape: [])
        for i in range(300)
    ]
    splits, rule = convert.assign(items, group="(p[0-9]+)_")
    assert "70 % train, 15 % val, 15 % test" in rule and "(p[0-9]+)_" in rule
    groups = {split: {item.name.split("_")[0] for item in part} for split, part in splits.items()}
    assert sum(map(len, groups.values())) == 100
    assert len(groups["train"]) == pytest.approx(70, abs=15)
    fewer, _ = convert.assign(items[::2], group="(p[0-9]+)_")
    for split, part in fewer.items():
        assert part == [item for item in splits[split] if item in items[::2]]
    singly, rule = convert.assign(items)
    assert singly != splits and "hash of NAME" in rule


def test_splits_are_those_of_the_paths(tmp_path, photos):
    for split, names in SPLITS.items():
        for name in names:
            (tmp_path / "sorted" / split).mkdir(parents=True, exist_ok=True)
            shutil.copy(photos / f"{name}.png", tmp_path / "sorted" / split)
            save(tmp_path / "masks" / split / f"{name}_mask.png", RING)
    patterns = f"{tmp_path}/sorted/SPLIT/NAME.*", f"{tmp_path}/masks/SPLIT/NAME_mask.png"
    convert.convert(FORMATS["masks"](*patterns), str(tmp_path / "root"))
    for split, names in SPLITS.items():
        assert open_dataset("folder", str(tmp_path / "root"), split).names == tuple(names)


def test_coco_has_a_file_of_each_split_and_paths_of_other_machines(tmp_path, photos):
    coco(tmp_path, photos)
    table = json.loads((tmp_path / "coco.json").read_text())
    paths = "images\\a.png", "/data/upload/1/b.png"  # as Label Studio may have them
    for split, path in zip(SPLITS, (*paths, "c.png"), strict=True):
        about = table["images"][0] | {"file_name": path}
        (tmp_path / f"coco_{split}.json").write_text(json.dumps(table | {"images": [about]}))
    found = FORMATS["coco"](f"{tmp_path}/coco_SPLIT.json", str(photos))
    report = convert.convert(found, str(tmp_path / "root"))
    assert report["splits"] == "as SPLIT in the paths has it"
    for split, name in (("train", "a"), ("val", "b"), ("test", "c")):
        assert open_dataset("folder", str(tmp_path / "root"), split).names == (name,), split
    change("coco_val.json", categories__0__name="x")(tmp_path)
    with pytest.raises(ValueError, match=r"coco_val.json: its categories are not"):
        FORMATS["coco"](f"{tmp_path}/coco_SPLIT.json", str(photos))


def test_images_of_one_name_in_several_folders_are_told_apart():
    assert formats.coco.names_of(["x/a.b.png", "x/c.png"]) == ["a.b", "c"]
    assert formats.coco.names_of(["x/a.png", "y/a.png"]) == ["x_a", "y_a"]


def change(path, **values):
    def call(folder):
        table = json.loads((folder / path).read_text())
        for dotted, value in values.items():
            *parents, last = (int(w) if w.isdigit() else w for w in dotted.split("__"))
            node = table
            for parent in parents:
                node = node[parent]
            node[last] = value
        (folder / path).write_text(json.dumps(table))

    return call


MISTAKES = {  # export, how to break it, and what the message must contain
    "no polygons": (
        coco,
        change("coco.json", annotations__0__segmentation=[]),
        ["coco.json: annotation 0 is a box without a mask"],
    ),
    "another size": (
        coco,
        change("coco.json", images__0__height=16, images__0__width=12),
        ["a.png", "12 x 16", "16 x 12", "EXIF"],
    ),
    "no category": (coco, change("coco.json", annotations__0__category_id=1), ["KeyError(1)"]),
    "two of a class": (
        coco,
        change("coco.json", categories__0__name="fiber"),
        ["['fiber'] more than once"],
    ),
    "no image": (coco, lambda f: (f / "photos/a.png").unlink(), ["photos/a.png", "1 images"]),
    "two images of a name": (
        coco,
        lambda f: (
            (f / "lists/train.txt").write_text("b")
            and change("coco.json", images__0__file_name="b.png")(f)
        ),
        ["several images of train", "b"],
    ),
    "not coco": (coco, lambda f: (f / "coco.json").write_text("[]"), ["not as COCO's format"]),
    "no such segment": (
        panoptic,
        change("panoptic.json", annotations__0__segments_info__0__id=6),
        ["a_p.png: has segments [5]"],
    ),
    "unknown shape": (
        labelme_,
        change("shapes/a.json", shapes__0__shape_type="points"),
        ["a.json", "a points of 5 points"],
    ),
    "too few points": (
        labelme_,
        change("shapes/a.json", shapes__0__points=[[1, 1], [2, 2]]),
        ["a.json", "a polygon of 2 points has no area"],
    ),
    "size of labelme": (
        labelme_,
        change("shapes/a.json", imageHeight=64, imageWidth=48),
        ["a.json", "(64, 48)", "(48, 64)"],
    ),
    "not labelme": (labelme_, lambda f: (f / "shapes/a.json").write_text("{}"), ["labelme's"]),
    "unknown color": (
        colors,
        lambda f: save(f / "painted/a_mask.png", np.full((*SIZE, 3), 7, np.uint8)),
        ["a_mask.png", "7,7,7 (192 pixels)", "--colors"],
    ),
    "a color twice": (
        colors,
        lambda f: (f / "labelmap.txt").write_text("a:0,0,0\nb:0,0,0::"),
        ["line 2", "'a' has the color of 'b'"],
    ),
    "not a color": (
        colors,
        lambda f: (f / "labelmap.txt").write_text("a:0,0,256"),
        ["line 1", "NAME:RED,GREEN,BLUE"],
    ),
    "no mask": (
        colors,
        lambda f: (f / "painted/a_mask.png").unlink(),
        ["no mask", "1 images", "photos/a.png"],
    ),
    "no image of a mask": (
        colors,
        lambda f: (f / "photos/a.png").unlink(),
        ["no image", "1 masks", "a_mask.png"],
    ),
    "a mask of grays": (
        mask_beside_the_image,
        lambda f: save(f / "photos/a_mask.png", np.arange(192, dtype=np.uint8).reshape(SIZE)),
        ["a_mask.png", "191 colors besides black", "--from=colors"],
    ),
    "a mask of another size": (
        mask_beside_the_image,
        lambda f: save(f / "photos/a_mask.png", RING[:5]),
        ["a_mask.png", "5 x 16"],
    ),
    "a format that cannot be read": (
        mask_beside_the_image,
        lambda f: (f / "photos/a.png").write_bytes(b"x"),
        ["photos/a.png", "not a readable image"],
    ),
    "a name that no list has": (
        mask_beside_the_image,
        lambda f: (f / "lists/val.txt").write_text("e\ng"),
        ["lists g", "the images are a, b"],
    ),
    "a name in two lists": (
        mask_beside_the_image,
        lambda f: (f / "lists/val.txt").write_text("a"),
        ["'a' is also in"],
    ),
    "other files in the output": (
        mask_beside_the_image,
        lambda f: save(f / "root/labels/train/z.png", RING),
        ["not of this conversion", "labels/train/z.png"],
    ),
    "a label of another origin": (
        mask_beside_the_image,
        lambda f: save(f / "root/labels/train/a.png", RING),
        ["labels/train/a.png is not of a conversion"],
    ),
    "other classes in the output": (
        mask_beside_the_image,
        lambda f: save(f / "root/x.png", RING) or (f / "root/dataset.json").write_text("{}"),
        ["dataset.json has other classes"],
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gives_one_clear_line(case, tmp_path, photos):
    made, break_it, words = MISTAKES[case]
    form, given, *_ = made(tmp_path, photos)
    break_it(tmp_path)
    with pytest.raises(ValueError) as error:
        lists = str(tmp_path / "lists")
        convert.convert(FORMATS[form](**given), str(tmp_path / "root"), lists)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_mask_that_moves_to_another_class_is_read_again(tmp_path, photos):
    form, given, *_ = mask_of_each_class(tmp_path, photos)
    lists, root, classes = str(tmp_path / "lists"), tmp_path / "root", tmp_path / "classes"
    convert.convert(FORMATS[form](**given), str(root), lists)
    before = read(root / "labels" / "train" / "a.png")
    for new, old in (("x", "cell"), ("cell", "fiber"), ("fiber", "x")):
        (classes / new).mkdir(exist_ok=True)
        (classes / old / "a.png").rename(classes / new / "a.png")
    (classes / "x").rmdir()
    report = convert.convert(FORMATS[form](**given), str(root), lists)
    assert "5 were complete before, 1 are made again" in report["images"]
    after = read(root / "labels" / "train" / "a.png")
    assert (after[RING & ~MASKS["fiber"]] == 2).all() and (
        before[RING & ~MASKS["fiber"]] == 1
    ).all()


def test_several_masks_with_all_classes_are_refused(tmp_path, photos):
    _, given, *_ = colors(tmp_path, photos)
    save(tmp_path / "painted" / "a_mask2.png", RING)
    with pytest.raises(ValueError, match=r"finds 2 masks of .*a.png, but one has all classes"):
        FORMATS["colors"](**given | {"masks": f"{tmp_path}/painted/NAME_mask*.png"})


def test_sources_are_never_written_to(tmp_path, photos):
    for split, names in SPLITS.items():
        for name in names:
            save(tmp_path / "images" / split / f"{name}.png", read(photos / f"{name}.png"))
            save(tmp_path / "labels" / split / f"{name}.png", RING)
    before = tree(tmp_path)
    found = FORMATS["masks"](f"{tmp_path}/images/SPLIT", f"{tmp_path}/labels/SPLIT")
    with pytest.raises(ValueError, match=r"not of this conversion: .*images/test/f.png"):
        convert.convert(found, str(tmp_path))
    assert tree(tmp_path) == before


def test_too_few_images_for_a_hash_are_refused(tmp_path, photos):
    form, given, *_ = mask_beside_the_image(tmp_path, photos)
    found = FORMATS[form](**given)
    with pytest.raises(ValueError, match=r"would be empty; write .*--lists=FOLDER"):
        convert.convert(found._replace(items=found.items[:2]), str(tmp_path / "root"))
    with pytest.raises(ValueError, match=r"--group=x matches nothing in 'a'"):
        convert.convert(found, str(tmp_path / "root"), group="x")


SMALL = [
    *("--config.num_steps=2", "--config.model.widths=(2,2)", "--config.data.crop_size=(8,8)"),
    *("--config.model.convs_per_level=1", "--config.eval.num_pictures=1"),
]


def test_the_page_goes_from_coco_to_a_first_score(tmp_path, photos):
    """The three commands of docs/annotations.md, in their order."""
    coco(tmp_path, photos)
    for path, _ in list(tree(photos).items()):
        for i in range(3):
            shutil.copy(path, photos / f"{path.stem}{i}.png")
    table = json.loads((tmp_path / "coco.json").read_text())
    shape = {"height": SIZE[0], "width": SIZE[1]}
    names = [f"{name}{i}.png" for name in NAMES for i in range(3)]
    table["images"] = [{"id": i, "file_name": n, **shape} for i, n in enumerate(names)]
    (tmp_path / "coco.json").write_text(json.dumps(table))
    page = (REPOSITORY / "docs" / "annotations.md").read_text()
    (block,) = re.findall(r"```bash\n(.*?)```", page.split("## ")[1], re.DOTALL)
    places = {
        "EXPORT/annotations/instances_default.json": f"{tmp_path}/coco.json",
        "EXPORT/images/default": str(photos),
        "runs/": f"{tmp_path}/runs/",
        "=ROOT": f"={tmp_path}/root",
    }
    for written, place in places.items():
        block = block.replace(written, place)
    commands = [shlex.split(line)[2:] for line in block.splitlines()]
    assert [module for module, *_ in commands] == [
        f"dense_jax.{name}" for name in ("data.convert", "main", "evaluate")
    ]
    commands[1] += SMALL
    ends = forked.run_all(
        {command[0]: command for command in commands}, "dense_jax.train", JAX_NUM_CPU_DEVICES="1"
    )
    for name, end in ends.items():
        assert end.code == 0, (name, end.err[-2000:])
    assert "splits: by a hash of NAME: 70 % train" in ends["dense_jax.data.convert"].out
    assert "mean IoU" in ends["dense_jax.evaluate"].out


def test_flags_of_other_formats_are_refused():
    end = forked.run_all(
        {
            0: ["dense_jax.data.convert", "--from=labelme", "--images=x", "--output=y"],
            1: ["dense_jax.data.convert", "--from=labelme", "--annotations=nowhere", "--output=y"],
        },
        "dense_jax.data.checks",
    )
    assert end[0].err == (
        "error: --annotations, --images: --from=labelme needs --annotations and takes --annotations\n"
    )
    assert end[1].err == "error: nowhere/NAME.json: no such files\n"
