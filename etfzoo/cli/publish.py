"""Publishes a trained model: one SavedModel folder, its model card, its entry in an index.

  python recipes/publish.py --workdir=runs/flowers --name=rn18_etf.flowers --licence=CC-BY-4.0
  python recipes/publish.py --workdir=runs/flowers --name=rn18_etf.flowers --models_dir=zoo \\
    --index=zoo/index.json --url=https://example.org/zoo

The version is read back and compared with the model before it gets its place. An existing version
is never overwritten. Stopped at any point, the same command again finishes it.
ETFZOO_INDEX=zoo/index.json makes the second one loadable by its name wherever that file is. An
entry without --url is for models that come with a checkout:

  python recipes/publish.py --workdir=runs/rn18 --name=rn18_etf.tiny100_64 --storage=float16 \\
    --index=etfzoo/zoo/index.json

--push=hf://owner/repo uploads the version and its card to Hugging Face's hub, too; without
--workdir and --model a version that was published before.
"""

import os
import shlex

from etfzoo.cli import app, flags
from etfzoo.cli.flags import FLAGS
from etfzoo.models.table import STORAGES


def main():
    import etfzoo
    from etfzoo.zoo import index, push

    again = FLAGS.push and not (FLAGS.workdir or FLAGS.model)
    if not again and bool(FLAGS.workdir) == bool(FLAGS.model):
        raise etfzoo.EtfzooError("say what to publish: --workdir=DIR or --model=HANDLE, not both")
    if not FLAGS.name:
        raise etfzoo.EtfzooError("say under which name, e.g. --name=rn18_etf.flowers")
    index.check_name(FLAGS.name)
    if FLAGS.push:
        push.check_address(FLAGS.push)
    folder = _there() if again else _publish()
    if not again:
        _tell(folder)
    if FLAGS.push:
        print(f"pushed: {push.push(folder, FLAGS.push, FLAGS.private)}")


def _tell(folder):
    """What was published, and what one does next."""
    from etfzoo.zoo import manifest, publication

    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(
        f"published {folder} ({size / 1e6:.1f} MB); read back, its weights are the same bit for "
        f"bit\ncard: {folder.parent / 'README.md'}"
    )
    if FLAGS.index:
        print(f"index: {FLAGS.index}")
    if FLAGS.url:
        address = publication.address(FLAGS.url, FLAGS.name, folder.name)
        pin = manifest.sha256(folder / manifest.NAME)
        print(f"address: {address}#sha256={pin}")
    code = f"import etfzoo; print(etfzoo.info({str(folder)!r}))"
    print(f"next: python -c {shlex.quote(code)}")


def _publish():
    from etfzoo.training.publish_run import publish_run

    return publish_run(
        FLAGS.workdir or FLAGS.model,
        FLAGS.name,
        FLAGS.models_dir,
        FLAGS.version,
        licence=FLAGS.licence,
        intended_use=FLAGS.intended_use,
        limits=FLAGS.limits,
        storage=FLAGS.storage,
        index_path=FLAGS.index,
        url=FLAGS.url,
        default=FLAGS.default,
        data_dir=FLAGS.data_dir,
    )


def _there():
    """The folder of a version that was published before, the highest where none is named."""
    import etfzoo
    from etfzoo.zoo.metadata import version_folders

    folders = version_folders(os.path.join(FLAGS.models_dir, FLAGS.name))
    version = FLAGS.version or max(folders, default=None)
    if version not in folders:
        raise etfzoo.EtfzooError(
            f"{FLAGS.models_dir} has no published {FLAGS.name}{f'@{version}' if version else ''}: "
            "publish it with --workdir=DIR or --model=HANDLE"
        )
    return folders[version]


def run():
    """Defines the flags and runs the command."""
    flags.path("Model", "workdir", None, "workdir of a finished training")
    flags.handle("Model", "model", None, "or a published folder or name")
    flags.string("Model", "name", None, "<backbone>_<method>.<tag>, e.g. rn18_etf.flowers")
    flags.integer(
        "Model",
        "version",
        None,
        "its number (default: one above the highest there)",
        **flags.VERSIONS,
    )
    flags.string("Model", "licence", None, "of the weights (default: the terms of their images)")
    flags.string("Model", "intended_use", None, "what it is good for (default: by the facts)")
    flags.string("Model", "limits", None, "what it is not good for (default: by the facts)")
    flags.string("Model", "storage", "float32", "float32 or float16", choices=STORAGES)
    flags.path("Files", "data_dir", None, "TFDS data directory, if not that of the training")
    flags.path("Files", "models_dir", "saved_models", "folder of the models")
    flags.path("Files", "index", None, "index file that gets an entry; made if needed")
    flags.string("Files", "url", None, "address under which models_dir will be found, with --index")
    flags.string(
        "Files", "push", None, "hf://owner/repo: a repository of the hub that gets it, too"
    )
    flags.boolean("Files", "private", False, "a repository that is made is private")
    flags.boolean("Files", "default", False, "the bare name means this model from now on")
    app.run(main, __doc__)
