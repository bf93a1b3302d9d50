#!/bin/sh
# Train and export what the tests of other tools open: bundles.sh TRAINKIT FOLDER SUFFIX
set -e
trainkit=$1 runs=$2/runs bundles=$2/bundles suffix=$3

made() { # made NAME OPTIONS: a run and its bundle
    name=$1-$suffix
    shift
    "$trainkit" train --data sample --runs "$runs" --name "$name" "$@"
    "$trainkit" export "$runs/$name" --format onnx --out "$bundles/$name"
}

made minilm --model prefix --backbone minilm --epochs 1 --max-length 128
made scratch --model simple --epochs 10
"$trainkit" export "$runs/minilm-$suffix" --precision int8 --data sample --out "$bundles/int8-$suffix"
