# shellcheck shell=bash
# Source this in the repository's root on a GPU machine without a network:
#
#   . tools/gpu/setup.sh
#
# Installs the wheels of .gpu/wheels beside the machine's own packages and exports PYTHONPATH, so that
# `python3 -m scheduler_svc` and its like run. Keeps what .gpu brought under $GPU_HOME, because a machine may
# get the halves of the model in two deliveries. A few seconds; done again it does nothing.
export GPU_HOME=${GPU_HOME:-/tmp/pagoda} PYTHONUNBUFFERED=1
mkdir -p "$GPU_HOME/results"
if [ ! -d "$GPU_HOME/site" ] && [ -d .gpu/wheels ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --root-user-action ignore --target "$GPU_HOME/site.new" .gpu/wheels/*.whl &&
    mv "$GPU_HOME/site.new" "$GPU_HOME/site"
fi
for half in 0 1; do
  if [ -f .gpu/smol-$half/part ]; then cp -u .gpu/smol-$half/part "$GPU_HOME/smol.$half"; fi
done
if [ -d .gpu/small ]; then cp -ru .gpu/small "$GPU_HOME/"; fi
if [ -f "$GPU_HOME/small/tokenizer.tar.xz" ] && [ ! -d "$GPU_HOME/tokenizer" ]; then
  mkdir -p "$GPU_HOME/tokenizer" && tar -xJf "$GPU_HOME/small/tokenizer.tar.xz" -C "$GPU_HOME/tokenizer"
fi
export PYTHONPATH=$GPU_HOME/site:$PWD:$PWD/clients/python
