"""Packaging. The base install is torch-free: packing, planning and launching need no GPU stack."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "uniemox_dist/__init__.py").read_text(), re.M).group(1)

BASE = [
    "click>=8.1",  # the command line
    "fsspec>=2024.2",  # shards and tables on local, network and object stores
    "jinja2>=3.1",  # reports, model cards, sbatch scripts
    "matplotlib>=3.8",  # the charts inside reports
    "numpy>=1.26",  # the plan of samples
    "packaging>=22",  # comparing versions; matplotlib brings it anyway
    "pillow>=11.3",  # decoding and checking pictures; its wheels decode AVIF since 11.3
    "psutil>=5.9",  # host facts in run folders
    "pyarrow>=15",  # indexes and tables
    "pydantic>=2.7",  # the configuration; attribute docstrings came with 2.7
    "pyyaml>=6.0",  # recipes
    "simplejpeg>=1.8",  # JPEGs straight into arrays, at a half or less where that is enough; reports truncated ones
    "tqdm>=4.66",  # progress bars
    "universal_pathlib>=0.2.6",  # pathlib's words for what fsspec reaches
]
# Tested with 2.11 (on a GPU), 2.14 and 2.15. The loader uses a private name, hence the upper bound.
TORCH = "torch>=2.11,<2.16"
WEBDATASET = (
    "webdataset>=1.0"  # its rules group the members of tars into samples; 1.0 is the series that was tested
)
STREAM = [TORCH, WEBDATASET]  # samples of any tars for any training loop, without models and DeepSpeed
MODELS = [
    TORCH,
    "torchvision>=0.26",  # the release that goes with torch 2.11; JPEG decoding and antialiased resizing
    "timm>=1.0.20",  # transformer blocks, and the layout of released encoders
    "scipy>=1.11",  # L-BFGS of the linear probe
    "threadpoolctl>=3.1",  # one BLAS thread in that solver
    "safetensors>=0.4.3",  # every file of weights that we write or read
]
TRAIN = [
    *MODELS,
    "deepspeed>=0.19,<0.20",  # ZeRO; checkpoints read its partitions, whose layout is that of this series
    "open_clip_torch>=3.0",  # the teacher; local-dir: models came with 3.0
    "tensorboard>=2.16",  # scalars and pictures of a run
    WEBDATASET,
]
CLUSTER = [
    "submitit>=1.5.2,<1.6"
]  # the Python way into Slurm; its script writer and signal handler are private names
PERSONS = ["onnxruntime>=1.17"]  # the person detector
EMOTIC = ["scipy>=1.11"]  # reads EMOTIC's Annotations.mat
REMOTE = [  # reading sources and shards from elsewhere; for gs:// install gcsfs
    "s3fs>=2024.2",  # s3://
    "aiohttp>=3.9",  # http:// and https://
]
HEIF = [
    # HEIC photos of phones. 1.0 is the first without AVIF, which Pillow decodes. Its wheels contain libheif and
    # libde265 (LGPL) and x265 (GPL), which no other part needs.
    "pillow-heif>=1.0,<2",
]
ONNX = [
    "onnx>=1.16",
    "onnxscript>=0.1",
    "onnxruntime>=1.17",
]  # torch's exporter needs two, the comparison one
PEERS = [  # loaders and trainers of others, in which the tests run the elastic stream
    # StatefulDataLoader asks the iterator of a sampler for its state; 0.11 was tested and is the last release.
    "torchdata>=0.11,<0.12",
    # `rescale_batches` changes the counts in its checkpoints; 2.6 was tested.
    "lightning>=2.6,<3",
    # 1.15 was tested: `prepare` reads `batch_size` of samplers, and leaves loaders alone that are not torch's.
    "accelerate>=1.15,<2",
    # 5.24 was tested: Trainer stores the state of callbacks, and has the loop that docs/elastic_loaders.md describes.
    "transformers>=5.24,<6",
]
DEV = [
    *EMOTIC,
    *HEIF,
    *REMOTE,
    *PEERS,
    *ONNX,  # small detectors made in tests; exported encoders
    "moto[server]>=5",  # a real S3 server on loopback
    "hypothesis>=6.100",  # property tests of the plan
    "mypy>=1.11",
    "pytest>=8",
    "pytest-xdist>=3.5",  # tests on all cores
    "ruff>=0.6",
    "scikit-image>=0.24",  # real photographs for detector and decoding tests
    "scikit-learn>=1.4",  # its figures of the same answers, beside ours
    "types-PyYAML",
]

setup(
    name="uniemox-dist",
    version=VERSION,
    description="Distributed pretraining of emotion-perception vision transformers by the UniEmoX method",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # An explicit package_dir makes an editable install a plain path entry; setuptools' import hook would
    # let a data folder named `shards/` in the working directory shadow the package of that name.
    package_dir={"": "."},
    packages=find_packages(include=["uniemox_dist*", "shards*", "launch*"]),
    package_data={
        "uniemox_dist": [
            "py.typed",
            "config/*.json",
            "teacher/demo_teacher/*",
            "release/*.j2",
            "runs/report/*.j2",
        ],
        "shards": [
            "*.md",
            "demo/*",
            "detect/weights/*",
            "inspect/*.j2",
            "overlap/*.j2",
            "pack/*.yaml",
            "sources/*.yaml",
            "sources/*.md",
        ],
        "launch": ["recipes/*.yaml", "clusters/*.yaml", "templates/*.j2"],
    },
    install_requires=BASE,
    extras_require={
        "stream": STREAM,
        "models": MODELS,
        "train": TRAIN,
        "cluster": CLUSTER,
        "persons": PERSONS,
        "onnx": ONNX,
        "emotic": EMOTIC,
        "remote": REMOTE,
        "heif": HEIF,
        "peers": PEERS,
        "all": [*TRAIN, *CLUSTER, *PERSONS, *EMOTIC, *REMOTE, *HEIF, *ONNX],
        "dev": DEV,
    },
    entry_points={"console_scripts": ["uniemox = uniemox_dist.cli.main:main"]},
)
