#!/bin/sh
# Train and export the bundles that other tools open: bundles.sh TRAINKIT FOLDER
set -e
trainkit=$1 runs=$2/runs bundles=$2/bundles

bundle() { # bundle NAME OPTIONS: a run and its bundle
    name=$1
    shift
    "$trainkit" train --data sample --runs "$runs" --name "$name" "$@"
    "$trainkit" export "$runs/$name" --format onnx --out "$bundles/$name"
}

bundle minilm --model prefix --backbone minilm --epochs 1 --max-length 128
bundle scratch --model simple --epochs 10
"$trainkit" export "$runs/minilm" --precision int8 --data sample --out "$bundles/int8"
