#!/usr/bin/env bash
# What takes too long for every push: the lowest dependencies that are declared, and the wheel in a clean environment.
#
#   bash dev/nightly.sh [lowest|wheel]        both unless one is named; tests run with "PYTEST_ARGS" (default: -m 'not slow')
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-all}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export MPLBACKEND=Agg OMP_NUM_THREADS=1
python=${PYTHON:-python3.11}

if [ "$what" != wheel ]; then
  "$python" -m venv "$work/lowest"
  . "$work/lowest/bin/activate"
  # every declared lower bound, of the tests' too, as an exact version; what these need comes as it fits
  python - > "$work/lowest.txt" <<'PY'
import re, tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for line in project["dependencies"] + project["optional-dependencies"]["test"]:
    name, bound, marker = re.fullmatch(r"([\w-]+)(?:>=([\w.]+))?[^;]*(;.*)?", line).groups()
    if bound is not None:
        print(f"{name}=={bound}{'.*' if bound.count('.') < 2 else ''}{marker or ''}")
PY
  cat "$work/lowest.txt"
  python -m pip install --quiet $(grep '^torch' "$work/lowest.txt")
  python -m pip install --quiet -e ".[test]" -c "$work/lowest.txt"
  python -m pip list | grep -i -E "^(anndata|captum|matplotlib|mudata|numpy|pandas|scanpy|scikit-learn|scipy|torch|triton|xarray|zarr) "
  python -m pytest -q -n "${WORKERS:-2}" ${PYTEST_ARGS:--m "not slow"}
  deactivate
fi

if [ "$what" != lowest ]; then
  "$python" -m venv "$work/build"
  "$work/build/bin/python" -m pip install --quiet build twine
  "$work/build/bin/python" -m build --outdir "$work/dist" .
  "$work/build/bin/python" -m twine check --strict "$work"/dist/*
  ls -l "$work/dist"
  for built in "$work"/dist/*.whl "$work"/dist/*.tar.gz; do
    "$python" -m venv --clear "$work/clean"
    begun=$SECONDS
    "$work/clean/bin/python" -m pip install --quiet ${TORCH:-} "$built"
    echo "$(basename "$built"): installed in $((SECONDS - begun)) s, $(du -sm "$work/clean" | cut -f1) MB with all dependencies"
    (cd "$work" && clean/bin/python -X importtime -c "import anvi" 2>&1 | tail -1 && time clean/bin/python -m anvi demo)
  done
fi
