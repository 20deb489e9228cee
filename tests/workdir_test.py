"""Names of what lies in a run's folder."""

import os

from etfzoo.workdir import folder_name


def test_names_of_data_sets_are_names_of_folders(tmp_path):
    assert folder_name("imagenet_resized/64x64") == "imagenet_resized_64x64"
    long = ["folder:" + "x/" * 3000 + end for end in ("a", "b")] + ["é" * 300, "\udce9" * 300]
    names = [folder_name(name) for name in long]
    assert len(set(names)) == len(long) and names == [folder_name(name) for name in long]
    for name in names:
        assert len(os.fsencode(name)) <= 120
        (tmp_path / name).mkdir()
