"""A published version for others: to a repository of Hugging Face's hub, with its own client."""

import re
from pathlib import Path

from etfzoo import files
from etfzoo.errors import EtfzooError, extra, first_line
from etfzoo.zoo import card, manifest
from etfzoo.zoo.metadata import read_metadata

# Licences by the names that the hub has for them; any other one is "other" there, with its text.
_LICENCES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-2.0", "cc-by-3.0",
    "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "gpl-3.0",
)  # fmt: skip
_METRICS = {
    "top1": ("accuracy", "top-1"),
    "top5": ("accuracy", "top-5"),
    "mean_per_class": ("accuracy", "mean per class"),
}


def check_address(address: str) -> str:
    """The repository `owner/repo` of `hf://owner/repo`.

    Raises:
        EtfzooError: another address, or no name that the hub takes.
    """
    with extra("hf"):
        from huggingface_hub.utils import validate_repo_id
    name = address.removeprefix("hf://")
    if name == address or not re.fullmatch("[^/@#?]+/[^/@#?]+", name):
        raise EtfzooError(f"{address!r} is no repository of the hub: write hf://owner/repo")
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise EtfzooError(f"{address!r} is no repository: {first_line(error)}") from error
    return name


def push(folder, address: str, private: bool = False) -> str:
    """Uploads a version as `<version>/` of a repository, and its card as that of the repository.

    It is one commit: all of it is there or nothing. A version that is there already is never
    overwritten; the same one again is left alone.

    Args:
        folder: a version folder that `etfzoo.publish` wrote.
        address: `hf://owner/repo`; the repository is made where there is none. The client takes
            the user's login (`hf auth login`, or HF_TOKEN).
        private: whether a repository that is made is private.

    Returns:
        The address for `etfzoo.load`, with the hash that pins its content.

    Raises:
        EtfzooError: a damaged folder, a wrong address, no login, another version of this number
            in the repository, or what the hub refuses.
    """
    repository, folder = check_address(address), Path(folder)
    with extra("hf"):
        import huggingface_hub
    manifest.verify(folder)
    version, name = folder.name, folder.parent.name
    listing = f"{version}/{manifest.NAME}"
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if api.file_exists(repository, listing):
            theirs = api.hf_hub_download(repository, listing)
            if files.read_bytes(theirs) != files.read_bytes(folder / manifest.NAME):
                raise EtfzooError(
                    f"{address} has another version {version}: publish this one under a new number"
                )
        else:
            names = sorted(p for p in folder.rglob("*") if p.is_file())
            operations = [
                huggingface_hub.CommitOperationAdd(
                    f"{version}/{path.relative_to(folder).as_posix()}", path
                )
                for path in names
            ]
            text = hub_card(name, version, read_metadata(folder)).encode()
            operations.append(huggingface_hub.CommitOperationAdd(card.NAME, text))
            api.create_commit(repository, operations, commit_message=f"{name}, version {version}")
    except EtfzooError:
        raise
    except Exception as error:  # the client has many, and none is the user's to debug
        raise EtfzooError(f"{address} did not take the model: {first_line(error)}") from error
    return f"{address}/{version}#sha256={manifest.sha256(folder / manifest.NAME)}"


def hub_card(name: str, version, metadata: dict) -> str:
    """The model card behind the header that the hub reads: licence, data, task, accuracy.

    Args:
        name, version, metadata: see `etfzoo.zoo.card.text`.
    """
    with extra("hf"):
        from huggingface_hub import EvalResult, ModelCardData
    made, metrics = metadata.get("provenance") or {}, metadata.get("metrics") or {}
    dataset = str(made.get("dataset") or "unknown")
    task = "image-feature-extraction" if metadata["spec"].head is None else "image-classification"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"[^\w.-]+", "_", dataset),
            dataset_name=str(made.get("title") or dataset),
            dataset_split=metrics.get("split"),
            metric_type=kind,
            metric_name=title,
            metric_value=metrics[key],
        )
        for key, (kind, title) in _METRICS.items()
        if isinstance(metrics.get(key), int | float)
    ]
    data = ModelCardData(
        **_licence(metadata.get("licence")),
        library_name="keras",
        tags=["etfzoo", "keras", "tf-keras-savedmodel", metadata["spec"].short_name],
        pipeline_tag=task,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{card.text(name, int(version), metadata)}"


def _licence(licence) -> dict:
    if not licence:
        return {}
    known = re.sub(r"[^a-z0-9.]+", "-", str(licence).lower()).strip("-")
    if known in _LICENCES:
        return {"license": known}
    return {"license": "other", "license_name": known[:60].strip("-")}
