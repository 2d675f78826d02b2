#!/bin/sh
# install_torch.sh PYTHON: install the torch of constraints.txt for that interpreter.
#
# The build is chosen, because an unpinned torch is gigabytes of CUDA libraries on Linux:
#   TORCH=cpu   (default) the CPU build: from the local wheels that pip knows of (PIP_FIND_LINKS),
#               else from TORCH_INDEX, else, with a warning, the package index's own build
#   TORCH=cuda  the package index's own build
set -eu
python=$1
constraints=$(dirname "$0")/../constraints.txt
index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
version=$(sed -n 's/^torch==//p' "$constraints")

install() {
    "$python" -m pip --disable-pip-version-check install "$@"
}

case ${TORCH:-cpu} in
cpu)
    if install --no-deps --no-index "torch==$version+cpu" 2>/dev/null; then
        exit
    fi
    if install --no-deps --retries 1 --timeout 15 --index-url "$index" "torch==$version"; then
        exit
    fi
    echo "No CPU build of torch $version at $index: taking the package index's own build," \
        "which on Linux brings several gigabytes of CUDA libraries." >&2
    install --constraint "$constraints" "torch==$version"
    ;;
cuda)
    install --constraint "$constraints" "torch==$version"
    ;;
*)
    echo "TORCH is '$TORCH'; it must be cpu or cuda." >&2
    exit 2
    ;;
esac
