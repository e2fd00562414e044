"""The local reduction by PCA and by an autoencoder, compared by retrieval.

    python tests/benchmarks/reductions.py --data PHOTOS --validate PLACES --dims 40 128

Fits both to the selected descriptors of the same photos and searches a folder of folders, one a place, with the local
features alone, as `train --validate` does: prints mean average precision, and the autoencoder's minus PCA's with the
95 % interval of a paired bootstrap over the queries.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from delf_milvus.evaluation.statistics import difference
from delf_milvus.evaluation.validation import RetrievalValidation
from delf_milvus.model.spec import BUNDLED
from delf_milvus.settings import Settings
from delf_milvus.training.reduction import ReductionConfig, fit_reduction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of photos that the reductions are fitted to")
    parser.add_argument("--validate", type=Path, required=True, help="folder of folders, one a place")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="whose trunk and attention are used")
    parser.add_argument("--dims", type=int, nargs="+", default=[40])
    parser.add_argument("--photos", type=int, default=300)
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--preset", choices=("fast", "standard", "paper"), default="fast", help="of the search")
    options = parser.parse_args()
    settings = Settings.model_validate({"extract": {"preset": options.preset}})
    judge = RetrievalValidation(options.validate, options.queries, settings)
    for dim in options.dims:
        found = []
        for method in ("pca", "autoencoder"):
            with tempfile.TemporaryDirectory() as folder:
                config = ReductionConfig(
                    (options.data,), Path(folder), options.model, dim=dim, photos=options.photos, global_dim=0,
                    method=method,
                )  # fmt: skip
                found.append(judge.precisions(fit_reduction(config))["retrieval_map"])
            print(f"{method}, {dim} components: mean average precision {found[-1].mean():.4f}")
        one = difference(*found, "mean")
        print(f"autoencoder - pca: {one.difference:+.4f} [{one.low:+.4f}, {one.high:+.4f}], {len(found[0])} queries")


if __name__ == "__main__":
    main()
