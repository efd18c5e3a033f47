#!/usr/bin/env bash
# Fit scANVI and TotalANVI to the PBMC file and write their cards: bash docs/examples/make.sh pbmc_citeseq.h5mu
set -euo pipefail
data=$1
here=$(dirname "$0")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1
for model in scanvi totalanvi; do
  python -m anvi fit "$data" "$work/$model.h5mu" --method "$model" --batch-key batch
  python -m anvi card "$work/$model.h5mu" --criticism --out "$here/$model.md" --overwrite \
    --license cc-by-4.0 --tissues blood \
    --description "PBMC of healthy donors, two 10x samples, one of them with 14 proteins and labels."
done
