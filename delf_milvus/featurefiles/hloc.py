"""`.h5`: the layout of hloc (cvg/Hierarchical-Localization, extract_features.py), one file for many photos.

A group for each photo, named by its path, slashes included:

    keypoints   (N, 2)  x then y, pixels of the photo, pixel centres at integers; attribute `uncertainty`, pixels
    descriptors (D, N)  as columns
    scores      (N,)    larger is better; optional
    scales      (N,)    size of a keypoint, in any unit that is the same for all photos; optional
    image_size  (2,)    width and height of the photo in pixels; optional
    global_descriptor (G,) one vector of the whole photo, as in hloc's files of global features; optional

hloc adds half a pixel only where it hands keypoints over to COLMAP, whose pixel centres are at halves. It stores half
precision by default, in which keypoints beyond pixel 1024 are whole pixels; here single precision is written, and any
kind of number is read. The file's attribute `extractor` is ours and may be absent: a name, or the JSON of a
`Fingerprint`.

Links to other files, and data sets that lie in other files, are never followed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from delf_milvus.featurefiles import reading
from delf_milvus.featurefiles.arrays import LocalFeatures, damaged, floats, size_of
from delf_milvus.featurefiles.hdf5 import NUMBERS, library

names = reading.names
extractor_of = reading.extractor


def read(path: Path, name: str) -> LocalFeatures:
    """The features of one photo; raises InputError, NotFoundError for a photo that the file does not have."""
    return read_with_digest(path, name)[0]


def read_with_digest(path: Path, name: str) -> tuple[LocalFeatures, str]:
    """The features of one photo, and the SHA-256, hexadecimal, of its arrays. Errors as of `read`."""
    source = f"{path}#{name}"
    arrays, extractor = reading.arrays(path, name)
    if missing := {"keypoints", "descriptors"} - set(arrays):
        damaged(source, f"it has no data set {min(missing)}")
    digest = hashlib.sha256()
    for key, values in arrays.items():
        digest.update(f"{key} {values.dtype.str} {values.shape} ".encode())
        digest.update(values.tobytes())
    numbers = {key: floats(arrays[key], key, source) for key in NUMBERS if key in arrays}
    if numbers["descriptors"].ndim != 2 or numbers["keypoints"].ndim != 2:
        damaged(source, "keypoints are of shape (N, 2), descriptors of (D, N)")
    found = LocalFeatures(
        numbers["keypoints"],
        np.ascontiguousarray(numbers["descriptors"].T),
        numbers.get("scores"),
        numbers.get("scales"),
        size_of(arrays["image_size"], source) if "image_size" in arrays else None,
        extractor,
        numbers.get("global_descriptor"),
    )
    return found, digest.hexdigest()


def write(path: Path, name: str, found: LocalFeatures, uncertainty: float = 1.0) -> None:
    """Add the features of one photo to a file, which is made where it is absent; replaces those of the same name.

    uncertainty: standard deviation of a keypoint, pixels. As hloc itself does, the file is opened for each photo: it is
    whole after each, but a process that is killed within may damage it. Raises OSError.
    """
    h5py = library()
    with h5py.File(path, "a", libver="latest") as file:
        if found.extractor:
            file.attrs["extractor"] = found.extractor
        if name in file:
            del file[name]
        group = file.create_group(name)
        group.create_dataset("keypoints", data=found.keypoints).attrs["uncertainty"] = uncertainty
        if found.scores is not None:
            group.create_dataset("scores", data=found.scores)
        if found.scales is not None:
            group.create_dataset("scales", data=found.scales)
        if found.global_descriptor is not None:
            group.create_dataset("global_descriptor", data=found.global_descriptor)
        if found.image_size is not None:
            group.create_dataset("image_size", data=np.array(found.image_size, np.int64))
        group.create_dataset("descriptors", data=np.ascontiguousarray(found.descriptors.T))
