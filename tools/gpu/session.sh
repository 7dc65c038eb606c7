#!/usr/bin/env bash
# One stage of measuring on a GPU machine, from the repository's root:  bash tools/gpu/session.sh STAGE ...
#
#   kernels        benchmarks/gpu_{attention,linear,sample}.py, each under a time limit of its own
#   smoke          setup, the 0.5B shape through the services, a few requests
#   pagoda-PRESET  all rows of PRESET (0.5b or 7b) through the services       (needs .gpu/wheels, .gpu/small)
#   vllm-PRESET    the same rows in vLLM, in process                          (needs .peers/vllm)
#   serve-PRESET   vLLM's OpenAI server under bench_serve.py                  (needs .peers, .gpu/small)
#   fa3            the device's ceilings, and FlashAttention 3                (needs .peers)
#   exactness      SmolLM2 beside transformers, float32 and bf16              (needs .gpu/smol-0 and -1, once each)
#   logits         its bf16 half alone
#   start-PRESET   process start to first token, three ways
#   soak-PRESET    20,000 mixed requests: no leak, integrity at rest; SOAK holds more flags of benchmarks.gpu_soak
#   table-PRESET   both engines' figures so far, side by side
#
# Stages run in the order given; one that fails does not stop the next. JSON and a log of each stage go to $OUT
# and stay in $GPU_HOME/results. PAGODA and VLLM hold more flags of benchmarks.gpu and benchmarks.gpu_vllm,
# COMMIT what is measured, LIMIT the seconds a stage may take.
set -uo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tools/gpu/setup.sh
. tools/gpu/setup.sh
OUT=${OUT:-$GPU_HOME/out}
RESULTS=$GPU_HOME/results
SMOL=$GPU_HOME/models/smollm2-135m-instruct
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
mkdir -p "$OUT"

limited() { # SECONDS COMMAND...: ends by itself, by TERM, or 20 s later by KILL
  local limit=$1
  shift
  timeout -k 20 "${LIMIT:-$limit}" "$@"
}

keep() { cp "$@" "$OUT/" 2>/dev/null || true; }

bench() { # PRESET NAME FLAGS...
  local preset=$1 name=$2
  shift 2
  # shellcheck disable=SC2086
  limited 540 python3 -m benchmarks.gpu --preset "qwen2.5-$preset" --out "$RESULTS/$name.json" --commit "$COMMIT" \
    --logs "$GPU_HOME/logs/$name" --vllm "$RESULTS/vllm-$preset.json" "$@" ${PAGODA:-}
  local rc=$?
  keep "$RESULTS/$name.json"
  return $rc
}

vllm() { # PRESET NAME FLAGS...: with the pack's packages in the place of ours
  local preset=$1 name=$2
  shift 2
  [ -d /tmp/vllmsite ] || bash .peers/vllm/unpack.sh || return 1
  (
    unset PYTHONPATH
    . .peers/vllm/env.sh
    # shellcheck disable=SC2086
    limited 570 python3 -m benchmarks.gpu_vllm --preset "qwen2.5-$preset" --out "$RESULTS/$name.json" \
      --append "$RESULTS/$name.json" --commit "$COMMIT" "$@" ${VLLM:-}
  )
  local rc=$?
  keep "$RESULTS/$name.json"
  return $rc
}

kernels() {
  local rc=0
  for name in attention linear sample; do
    [ -f benchmarks/gpu_$name.py ] || { echo "no benchmarks/gpu_$name.py" && continue; }
    echo "--- gpu_$name"
    limited 100 python3 -m benchmarks.gpu_$name || { rc=$? && echo "gpu_$name ended with $rc"; }
  done
  return $rc
}

fa3() {
  [ -d /tmp/vllmsite ] || bash .peers/vllm/unpack.sh || return 1
  limited 60 python3 .peers/bench/probe.py --out "$RESULTS/probe.json"
  (unset PYTHONPATH && . .peers/vllm/env.sh && limited 100 python3 -P .peers/bench/bench_fa3.py --out "$RESULTS/fa3.json")
  keep "$RESULTS/probe.json" "$RESULTS/fa3.json"
}

smol() { # the embedded model's folder, and the flags that name it and the prompts
  SMOL_FLAGS=(--model "$SMOL" --prompts "$GPU_HOME/small/prompts.json" --commit "$COMMIT")
  python3 -m tools.gpu.join_model "$GPU_HOME"/smol.0 "$GPU_HOME"/smol.1 "$GPU_HOME/small/SHA256SUMS.json" "$SMOL"
}

logits() {
  smol || return 1
  limited 120 python3 -m benchmarks.gpu_logits "${SMOL_FLAGS[@]}" --out "$RESULTS/logits.json"
  local rc=$?
  keep "$RESULTS/logits.json"
  return $rc
}

exactness() {
  smol || return 1
  local rc=0
  limited 300 python3 -m benchmarks.gpu_exactness "${SMOL_FLAGS[@]}" --reference "$RESULTS/reference.json" \
    --out "$RESULTS/exactness.json" || rc=$?
  logits || rc=$?
  keep "$RESULTS/exactness.json" "$RESULTS/reference.json"
  return $rc
}

soak() { # PRESET
  # shellcheck disable=SC2086
  limited 420 python3 -m benchmarks.gpu_soak --preset "qwen2.5-$1" --out "$RESULTS/soak-$1.json" \
    --logs "$GPU_HOME/logs/soak-$1" --commit "$COMMIT" ${SOAK:-}
  local rc=$?
  keep "$RESULTS/soak-$1.json"
  return $rc
}

stage() {
  local preset=${1##*-}
  local text=(--tokenizer "$GPU_HOME/tokenizer" --peers .peers/bench)
  case $1 in
  kernels | fa3 | exactness | logits) "$1" ;;
  smoke) bench 0.5b smoke --rows latency,sharegpt --batches 1,8 --num-requests 64 --num-fixed 64 --repeat 1 --limit-s 60 ;;
  pagoda-*)
    if [ -d .peers/bench ]; then
      bench "$preset" "pagoda-$preset" --rows latency,sharegpt,fixed,stops,openai "${text[@]}"
    else
      bench "$preset" "pagoda-$preset"
    fi
    ;;
  vllm-*) vllm "$preset" "vllm-$preset" ;;
  serve-*) vllm "$preset" "vllm-$preset" --rows openai "${text[@]}" ;;
  soak-*) soak "$preset" ;;
  start-*) bench "$preset" "start-$preset" --rows start --checkpoint ;;
  table-*) python3 -m benchmarks.gpu_bars "qwen2.5-$preset" "$RESULTS"/{pagoda,start}-"$preset".json "$RESULTS/vllm-$preset.json" ;;
  *) echo "no stage $1; see the head of this file" && return 2 ;;
  esac
}

rc=0
for name in "$@"; do
  began=$SECONDS
  echo "=== $name"
  stage "$name" 2>&1 | tee "$RESULTS/$name.log"
  code=${PIPESTATUS[0]}
  echo "=== $name: exit $code after $((SECONDS - began)) s"
  [ "$code" = 0 ] || rc=$code
done
tar -czf "$OUT/logs.tar.gz" -C "$GPU_HOME" --exclude='*.json' results $(cd "$GPU_HOME" && ls -d logs 2>/dev/null)
exit "$rc"
