"""Describes public datasets in their original file formats. Each dataset is an entry of CATALOG.

An entry says what the raw label values mean and where the files are, relative to the root. Palettes
hold a dataset's official colors. Splits without public labels are omitted.
"""

from dense_jax.data.files import Classes, FilesDataset, Layout, Stacks


def _colors(text: str) -> tuple[tuple[int, ...], ...]:
    """Parses colors written as rrggbb and separated by spaces."""
    return tuple(tuple(bytes.fromhex(color)) for color in text.split())


def _voc_color(i: int) -> tuple[int, ...]:
    """Returns the RGB color of class i in the palette of PASCAL VOC."""
    return tuple(
        sum((i >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)
    )


_LAYOUT_OF_FOLDER = Layout(
    images="images/SPLIT/NAME.*",
    labels="labels/SPLIT/NAME.png",
    folders={"train": "train", "val": "val", "test": "test"},
)

_ADE_NAMES = """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
    person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
    house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
    railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink,
    skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
    pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower,
    book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar,
    arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
    television, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle,
    buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
    swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food,
    step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket,
    sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
    monitor, bulletin board, shower, radiator, glass, clock, flag
"""
_ADE_COLORS = """
    787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d
    787846 08ff33 ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0
    0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06
    ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00
    ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff 00ff70
    00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99
    ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52
    000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00
    08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff
    9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00
    00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8
    005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
"""

CATALOG = {
    # CamVid (Brostow et al. 2009) in the version from the tutorial by SegNet's authors, which has
    # 360 x 480 pixels and 11 classes. The colors are also from the tutorial.
    "camvid": FilesDataset(
        classes=Classes(
            names=(
                *("sky", "building", "pole", "road", "pavement", "tree"),
                *("sign_symbol", "fence", "car", "pedestrian", "bicyclist"),
            ),
            values=tuple(range(11)),
            ignored_values=(11,),
            palette=_colors(
                "808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0"
            ),
        ),
        layouts=(
            Layout(
                images="SPLIT/NAME.png",
                labels="SPLITannot/NAME.png",
                folders={"train": "train", "val": "val", "test": "test"},
            ),
            _LAYOUT_OF_FOLDER,
        ),
    ),
    # The fine annotations of Cityscapes (Cordts et al. 2016). Of the 34 label ids, 19 are classes.
    "cityscapes": FilesDataset(
        classes=Classes(
            names=(
                *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light"),
                *("traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car"),
                *("truck", "bus", "train", "motorcycle", "bicycle"),
            ),
            values=(7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33),
            # 255 is label id -1 (license plate) as uint8. It does not occur in the released files.
            ignored_values=(*range(7), 9, 10, 14, 15, 16, 18, 29, 30, 255),
            palette=_colors(
                "804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98"
                " 4682b4 dc143c ff0000 00008e 000046 003c64 005064 0000e6 770b20"
            ),
        ),
        layouts=(
            Layout(
                images="leftImg8bit/SPLIT/*/NAME_leftImg8bit.png",
                labels="gtFine/SPLIT/*/NAME_gtFine_labelIds.png",
                folders={"train": "train", "val": "val"},
            ),
        ),
    ),
    # ISBI 2012 EM challenge (Cardona et al. 2010). The labels of the test volume are not public, so
    # the last 6 of the 30 training sections are held out, as a block because neighbors look alike.
    "isbi2012": FilesDataset(
        classes=Classes(names=("membrane", "interior"), values=(0, 255)),
        layouts=(
            Stacks(
                images="train-volume.tif",
                labels="train-labels.tif",
                pages={"train": range(24), "val": range(24, 30)},
            ),
            _LAYOUT_OF_FOLDER,
        ),
        num_channels=1,
    ),
    # Lost and Found (Pinggera et al. 2016), with the classes free road and obstacle on the road.
    "lost_and_found": FilesDataset(
        classes=Classes(
            names=("free", "obstacle"),
            values=(1, (*range(2, 31), 32, 35, *range(40, 44))),
            # The background and flat, harmless objects: a pole, posts, timber, a wheel cap.
            ignored_values=(0, 31, 33, 34, 36, 37, 38, 39),
            palette=_colors("804080 00008e"),
        ),
        layouts=(
            Layout(
                images="leftImg8bit/SPLIT/*/NAME_leftImg8bit.png",
                labels="gtCoarse/SPLIT/*/NAME_gtCoarse_labelIds.png",
                folders={"train": "train", "test": "test"},
            ),
        ),
    ),
    # PASCAL VOC (Everingham et al.) and the Semantic Boundaries Dataset (Hariharan et al. 2011),
    # which labels more of the VOC images. Every file that lists image names is a split. Users
    # may add such files, for example FCN's seg11valid.txt.
    "pascal_voc": FilesDataset(
        classes=Classes(
            names=(
                *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car"),
                *("cat", "chair", "cow", "diningtable", "dog", "horse", "motorbike", "person"),
                *("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
            ),
            values=tuple(range(21)),
            ignored_values=(255,),
            palette=tuple(map(_voc_color, range(21))),
        ),
        layouts=(
            *(
                Layout(
                    images=f"{above}JPEGImages/NAME.jpg",
                    labels=f"{above}SegmentationClass/NAME.png",
                    lists=f"{above}ImageSets/Segmentation/SPLIT.txt",
                )
                for above in ("", "VOCdevkit/VOC2012/")
            ),
            Layout(
                images="dataset/img/NAME.jpg",
                labels="dataset/cls/NAME.mat",
                lists="dataset/SPLIT.txt",
            ),
        ),
    ),
    # ADE20K, Zhou et al. 2017: the 150 classes of the MIT Scene Parsing Benchmark.
    "scene_parse150": FilesDataset(
        classes=Classes(
            names=tuple(name.strip() for name in _ADE_NAMES.split(",")),
            values=tuple(range(1, 151)),
            ignored_values=(0,),  # everything else
            palette=_colors(_ADE_COLORS),
        ),
        layouts=(
            Layout(
                images="images/SPLIT/NAME.jpg",
                labels="annotations/SPLIT/NAME.png",
                folders={"train": "training", "val": "validation"},
            ),
        ),
    ),
}
