"""Makes the data set `tiny_imagenet` from its public archive, or one that is read by index.

  wget http://cs231n.stanford.edu/tiny-imagenet-200.zip
  python recipes/prepare.py --archive=tiny-imagenet-200.zip --data_dir=data
  python recipes/pretrain.py --dataset=tiny_imagenet --data_dir=data --backbone=rn18

Of the archive of Tiny ImageNet, which TFDS lacks: every second of the 200 classes, sorted by
WordNet id, with all of its images (50,000 to train, 5,000 to validate), as a TFDS data set. The
images' bytes stay as they are. About a minute; stopped before its end it leaves nothing, and what
is there already is left alone.

  python recipes/prepare.py --dataset=imagenet2012 --data_dir=data --file_format=array_record \\
    --output=indexed
  python recipes/pretrain.py --dataset=imagenet2012 --data_dir=indexed

Of any data set that TFDS has prepared as tfrecord: a copy as array_record, for one that is larger
than memory or read by several workers. Each then reads its own images only, and a run that goes on
in the middle of an epoch reads nothing twice. Stopped before its end it goes on where it was.
"""

from etfzoo.cli import app, configs, flags
from etfzoo.cli.flags import FLAGS


def main():
    import etfzoo

    if FLAGS.archive and FLAGS.dataset:
        raise etfzoo.EtfzooError("--archive and --dataset are two tasks: give one of them")
    if FLAGS.dataset:
        _convert(etfzoo)
    elif FLAGS.archive:
        _tiny_imagenet(etfzoo)
    else:
        raise etfzoo.EtfzooError("say where it is: --archive=tiny-imagenet-200.zip or its folder")


def _convert(etfzoo):
    from etfzoo.data import conversion

    if not FLAGS.file_format or not FLAGS.output:
        raise etfzoo.EtfzooError(
            "say what is made of it, and where: --file_format=array_record --output=FOLDER"
        )
    source, made = conversion.convert(FLAGS.dataset, FLAGS.data_dir, FLAGS.output)
    splits = source.builder.info.splits
    images = ", ".join(f"{split} {splits[split].num_examples:,} images" for split in splits)
    shards = sum(len(splits[split].shard_lengths) for split in splits)
    print(f"{'converted' if made else 'there already'}: {images}, in {shards:,} files")
    configs.print_next("pretrain", dataset=FLAGS.dataset, data_dir=FLAGS.output)


def _tiny_imagenet(etfzoo):
    from etfzoo.data import sources, tiny_imagenet

    if FLAGS.file_format or FLAGS.output:
        raise etfzoo.EtfzooError(
            "--file_format and --output go with --dataset=tiny_imagenet, once that is prepared"
        )
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
    flags.string("Files", "dataset", None, "a prepared data set of TFDS that is to be converted")
    flags.path("Files", "data_dir", None, "TFDS data directory (default: TFDS's own)")
    flags.string("Files", "file_format", None, "what --dataset becomes", ("array_record",))
    flags.path("Files", "output", None, "data directory that the converted data set goes to")
    app.run(main, __doc__)
