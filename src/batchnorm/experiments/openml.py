"""Image sets from OpenML, fetched and cached by scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np

from batchnorm.errors import DataError, expected
from batchnorm.experiments.idx_folder import Bytes


def fetch(name: str, title: str, *, side: int, train: int) -> Bytes:
    """The set ``name``, version 1, of square grey images.

    Args:
        name: at OpenML.
        title: for the error.
        side: pixels of an image's side.
        train: number of training images; they come first.

    Raises:
        DataError: it is neither in scikit-learn's cache nor can it be fetched.
    """
    from importlib.util import find_spec

    from sklearn.datasets import fetch_openml

    try:
        # pandas reads the file in seconds where scikit-learn's own reader needs a minute, but it is no dependency.
        parser = "pandas" if find_spec("pandas") else "liac-arff"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each retry; our own error follows the last
            images, labels = fetch_openml(name, version=1, return_X_y=True, as_frame=False, parser=parser)
    except (OSError, ValueError) as error:
        raise DataError(
            expected(
                "load",
                f"{title} from OpenML, or in scikit-learn's cache",
                f"{type(error).__name__}: {error}",
                "Check the connection, or give a folder with the four IDX files.",
            )
        ) from error
    pixels = np.asarray(images).astype(np.uint8).reshape(-1, side, side)
    classes = np.asarray(labels).astype(np.uint8)
    return Bytes(pixels[:train], classes[:train], pixels[train:], classes[train:])
