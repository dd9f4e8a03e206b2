#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without a network: bench/gpu.sh OUTDIR [SECONDS]
# Builds, tests, measures, looks for bad accesses and races. Each step has a limit of its own, and all of them together
# one of 8 minutes; what fails is recorded and does not stop the rest. A tree without its history is told its commit:
# FASTCLIP_COMMIT=...
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?usage: bench/gpu.sh OUTDIR [SECONDS]}" && cd "$1" && pwd)
python=${PYTHON:-python3}
commit=${FASTCLIP_COMMIT:-$(git log -1 --format=%H)}
failed=0 all=${2:-480}
: >"$out/steps.tsv"

# step NAME SECONDS COMMAND...: its output goes to the log; the last lines and the outcome, also in $code, are shown. With
# FAILS_ON only that exit code is a failure, and the step may be left out
step() {
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  code=0
  if [ "$limit" -gt $((all - SECONDS)) ]; then limit=$((all - SECONDS)); fi
  if [ "$limit" -lt 5 ]; then
    printf '%s\t%s\t0\n' "$name" "no time left" | tee -a "$out/steps.tsv"
    [ -n "${FAILS_ON:-}" ] || failed=1
    return
  fi
  printf '\n== %s (at %d s, limit %d s)\n' "$name" "$SECONDS" "$limit" | tee -a "$out/log.txt"
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/step.txt" 2>&1 || code=$?
  cat "$out/step.txt" >>"$out/log.txt"
  tail -n 25 "$out/step.txt" | cut -c1-300
  printf '%s\t%d\t%d\n' "$name" "$code" "$((SECONDS - start))" | tee -a "$out/steps.tsv"
  [ "$code" -eq 0 ] || [ "$code" -ne "${FAILS_ON:-$code}" ] || failed=1
}

step "machine" 20 bash -c "nvidia-smi; nvcc --version; echo $commit; $python -m pip list 2>/dev/null | grep -iE '^(torch|triton|numpy|pytest|hypothesis|pybind11|setuptools)'"
install=("$python" -m pip install --no-build-isolation --no-deps --no-index -v -e .)
backend=cuda
FASTCLIP_CUDA=1 step "build" 150 "${install[@]}"
if [ "$code" -ne 0 ]; then # Triton's kernels need no nvcc
  FASTCLIP_CUDA=0 step "build without CUDA's kernels" 100 "${install[@]}"
  backend=triton
fi
step "what runs here" 30 "$python" -m fastclip
export FASTCLIP_BACKEND=$backend

# Without pytest-timeout pyproject's own settings would be an error.
pytest=("$python" -m pytest -p no:cacheprovider -q)
"$python" -c "import pytest_timeout" 2>/dev/null || {
  printf '[pytest]\naddopts = -ra\n' >"$out/pytest.ini"
  pytest+=(-c "$out/pytest.ini" --rootdir .)
}
# Triton compiles a kernel for each set of dtypes and kind of request: nearly all of the time, so in several processes.
"$python" -c "import xdist" 2>/dev/null && pytest+=(-n 8)
# Here a test that is skipped for want of a GPU hides a gap, too.
export CI=1 FASTCLIP_ON_GPU=1
[ $backend = cuda ] && step "tests of the CUDA backend" 90 "${pytest[@]}" tests/test_cuda.py
FASTCLIP_BACKEND= step "tests through the functions" 90 "${pytest[@]}" tests/test_on_gpu.py
step "numbers" 200 "$python" -m fastclip.bench.gpu --json "$out/gpu.json" --markdown "$out/gpu.md"
step "numbers beside the model's" 20 "$python" -m fastclip.bench.model --json "$out/gpu.json" --markdown "$out/model.md"

FASTCLIP_BACKEND= step "tests of both backends' kernels" 150 "${pytest[@]}" tests/test_gpu_kernels.py tests/test_triton.py
FASTCLIP_BACKEND= step "the page on graphs" 60 "${pytest[@]}" tests/test_docs.py -k cuda_graphs

# One allocation of the driver's for each tensor, so that an access past its end is seen. Some machines refuse the tool, and
# it may take longer than there is time: only what it finds is a failure.
for tool in memcheck racecheck initcheck; do
  if command -v compute-sanitizer >/dev/null; then
    api=$([ "$tool" = memcheck ] && echo "--report-api-errors no")  # torch asks on purpose what may fail
    # shellcheck disable=SC2086
    FAILS_ON=9 PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "compute-sanitizer $tool" 60 \
      compute-sanitizer --tool "$tool" $api --error-exitcode 9 "$python" -m fastclip.bench.gpu --short
  else
    printf 'compute-sanitizer %s\t%s\t0\n' "$tool" "not there" | tee -a "$out/steps.tsv"
  fi
done
# Last, as it needs no GPU: only that this compiler, too, made what it should.
[ $backend = cuda ] && FAILS_ON=1 step "tests of the machine code" 60 "${pytest[@]}" tests/test_cuda_build.py

"$python" - "$out" <<'EOF'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
steps = [line.split("\t") for line in (out / "steps.tsv").read_text().splitlines()]
rows = [{"step": name, "exit": code, "seconds": int(seconds)} for name, code, seconds in steps]
(out / "steps.json").write_text(json.dumps(rows, indent=1) + "\n")
table = ["| step | exit | seconds |", "| --- | --- | ---: |", *(f"| {' | '.join(each)} |" for each in steps)]
for name in ("gpu.md", "model.md"):
    table += ["", (out / name).read_text()] if (out / name).exists() else ["", f"{name} was not written"]
(out / "summary.md").write_text("\n".join(table) + "\n")
EOF
rm -f "$out/step.txt" "$out/steps.tsv" "$out/pytest.ini"
printf '\nall of it took %d s; see %s\n' "$SECONDS" "$out/summary.md"
exit "$failed"
