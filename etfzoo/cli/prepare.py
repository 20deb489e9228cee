"""Makes the data set `tiny_imagenet` from the public archive of Tiny ImageNet, which TFDS lacks.

  wget http://cs231n.stanford.edu/tiny-imagenet-200.zip
  python recipes/prepare.py --archive=tiny-imagenet-200.zip --data_dir=data
  python recipes/pretrain.py --dataset=tiny_imagenet --data_dir=data --backbone=rn18

Every second of the 200 classes, sorted by WordNet id, with all of its images (50,000 to train,
5,000 to validate), as a TFDS data set. The images' bytes stay as they are. About a minute; stopped
before its end it leaves nothing, and what is there already is left alone.
"""

from etfzoo.cli import app, configs, flags
from etfzoo.cli.flags import FLAGS


def main():
    import etfzoo
    from etfzoo.data import sources, tiny_imagenet

    if not FLAGS.archive:
        raise etfzoo.EtfzooError("say where it is: --archive=tiny-imagenet-200.zip or its folder")
    folder = tiny_imagenet.prepare(FLAGS.archive, FLAGS.data_dir)
    source = sources.resolve("tiny_imagenet", FLAGS.data_dir)
    official = source.row.counts
    found = {split: source.size(split) for split in official}
    images = ", ".join(f"{split} {count:,} images" for split, count in found.items())
    print(f"{'prepared' if folder else 'there already'}: {source.num_classes} classes, {images}")
    if found != official:
        print(f"note: the public archive has {', '.join(f'{official[s]:,} ({s})' for s in found)}")
    configs.print_next(
        "pretrain", dataset="tiny_imagenet", data_dir=FLAGS.data_dir, backbone="rn18"
    )


def run():
    """Defines the flags and runs the command."""
    flags.path("Files", "archive", None, "tiny-imagenet-200.zip, or the folder that it unpacks to")
    flags.path("Files", "data_dir", None, "TFDS data directory (default: TFDS's own)")
    app.run(main, __doc__)
