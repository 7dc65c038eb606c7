#!/usr/bin/env bash
# Generates the Python stubs from protos/ into the SDK's package with the pinned generator.
# `tools/gen_protos.sh` writes them; `tools/gen_protos.sh --check` fails when the checked-in ones differ.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=.venv-tools
if [ ! -x $tools/bin/protoc-gen-mypy ]; then
  python3 -m venv $tools
  $tools/bin/pip install -q grpcio-tools==1.76.0 mypy-protobuf==3.6.0 'setuptools<81'
fi
out=clients/python
[ "${1:-}" = --check ] && out=$(mktemp -d)
mapfile -t protos < <(cd protos && find pagoda -name '*.proto' | sort)
PATH="$PWD/$tools/bin:$PATH" $tools/bin/python -m grpc_tools.protoc -I protos \
  --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" "${protos[@]}"
[ "${1:-}" = --check ] || exit 0
status=0
while IFS= read -r file; do
  cmp -s "$out/$file" "clients/python/$file" || { echo "stale: clients/python/$file (run make protos)"; status=1; }
done < <(cd "$out" && find . -name '*_pb2*' | sed 's|^\./||')
rm -rf "$out"
exit $status
