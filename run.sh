#!/usr/bin/env bash
# Plaintune's front door: `bash run.sh VERB ...`; `bash run.sh` alone lists the verbs.
# It sets .venv up; each verb but `setup` and `test` is a module of common/verbs, which takes this process over.
set -euo pipefail
caller=$PWD  # relative paths, the defaults' too, start here, as for `deepspeed train_sft.py`
cd "$(dirname "${BASH_SOURCE[0]}")"

trap 'printf "\rstopped: the same command begins again\n" >&2; exit 130' INT
root=$PWD
python=$root/.venv/bin/python
flash_attn=('flash-attn-4[cu13]==4.0.0b36' nvidia-cutlass-dsl==4.8.1 quack-kernels==0.6.5 apache-tvm-ffi==0.1.15.post2)

usage() {
    cat <<'END'
usage: bash run.sh VERB [...]
  sanity                    train a tiny model with SFT, then DPO, talk to both, judge (minutes, no GPU needed)
  sanity sft|dpo [N] [flags]  the real recipe for 100 steps on N GPUs (default 1), judged; output/sanity-sft or -dpo
  sft|dpo [N] [flags]       the full recipe on N GPUs (default: all; without a GPU: 2 CPU processes)
  push OUTPUT_DIR [flags]   upload a finished run's model to the hub, again if need be (--hub_model_id, --hub_overwrite, ...)
  plan sft|dpo [N] [flags]  steps, memory, disk, hours and cost of a run, and what is wrong with it; no GPU needed (--gpu h100)
  data sft|dpo [flags]      what would be trained, and what not, without training (--show 5, --row FILE:ROW)
  compare OUT1 [OUT2 ...]   what differs between runs, and their curves in one picture (--picture compare.png)
  bench sft|dpo [N] [flags] throughput of a named shape with random weights (--shape llama-8b --steps 10 --lengths tulu|full)
  export CHECKPOINT OUT_DIR the Hugging Face folder of a checkpoint, no GPU needed
  verify OUTPUT_DIR [--step K] digests of all checkpoints; step K computed again and compared bitwise
  test [pytest flags]       the test suite; without flags, on a machine with a GPU, also what needs one
  setup                     make .venv from requirements.txt (the other verbs do it when needed)
    TORCH_INDEX_URL=URL       where torch comes from; the CPU index saves gigabytes
    INSTALL_FLASH_ATTN=1|0    flash-attn 4's wheels, an optional addition for Hopper (by default) and Blackwell; 0: none
Relative paths, the defaults (output/...) too, start where you stand. `bench --help` and `sanity --help` say more.
END
}

fail() {  # fail EXIT_CODE MESSAGE
    echo "error: $2" >&2
    exit "$1"
}

# ---------------------------------------------------------------------- set-up
setup() {  # makes .venv with the first Python that is new enough; the stamp comes last: a set-up cut off is done over
    local base wanted torch
    for base in python3 python3.11 python3.12 python3.13 python3.14 ''; do
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    [[ -n $base ]] || fail 2 "Python 3.11 or newer is needed; python3 is $(python3 -V 2>/dev/null || echo missing)"
    wanted=$({ "$base" -VV; cat requirements.txt; } | sha256sum)
    if [[ $(cat .venv/.stamp 2>/dev/null) != "$wanted" ]]; then
        echo "setting up .venv with $("$base" -V) (minutes; the downloads are the longest part)"
        rm -rf .venv
        "$base" -m venv .venv || fail 1 "$base cannot make a .venv (on Debian and Ubuntu: apt install python3-venv)"
        torch=$(grep -oE '^torch==[^ #]+' requirements.txt)
        pip_install ${TORCH_INDEX_URL:+--no-deps --index-url "$TORCH_INDEX_URL"} "$torch"
        DS_BUILD_OPS=0 pip_install -r requirements.txt
        [[ -z ${INSTALL_FLASH_ATTN:-} && $(compute_capability) == 9.* ]] &&
            [[ $("$python" -c 'import torch; print(torch.version.cuda)') == 13.* ]] && install_flash_attn
        echo "$wanted" >.venv/.stamp
    fi
    [[ ${INSTALL_FLASH_ATTN:-0} == 0 ]] || install_flash_attn
}

pip_install() {
    echo "  installing $*"
    "$python" -m pip install --quiet --disable-pip-version-check "$@" ||
        fail 1 "pip could not install $*; see above. The same command starts over"
}

compute_capability() {  # of the oldest GPU; nothing without one
    { nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true; } | sort -n | head -n 1
}

install_flash_attn() {  # an optional addition: no failure of its stops anything
    "$python" -c 'import flash_attn' 2>/dev/null && return
    [[ $(compute_capability) =~ ^(9|10)\. ]] && (pip_install "${flash_attn[@]}") ||
        echo "flash-attn is left out: its wheels are for Hopper and Blackwell GPUs. torch's own attention is used"
}

# ---------------------------------------------------------------------- verbs
verb() {  # verb NAME [...]: a module of common/verbs, in place of this process, from where the user stands
    setup
    cd "$caller"
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -P -m common.verbs "$@"  # -P: no module of the user's
}

tests() {  # tests [pytest flags]
    local exit_code=0
    setup
    "$python" -m pytest -q "${@:-tests}" || exit_code=$?
    if (($# == 0)) && "$python" -c 'from common.verbs.launch import visible_gpus; exit(not visible_gpus())'; then
        echo "the tests that need a GPU:"
        "$python" -m pytest -q -m cuda tests || exit_code=$?
    fi
    exit "$exit_code"
}

main() {
    case ${1:-} in
        setup) setup ;;
        test) tests "${@:2}" ;;
        sft | dpo) verb launch "$@" ;;
        sanity | bench | plan | data | push | compare | export | verify) verb "$@" ;;
        help | -h | --help) usage ;;
        *)
            [[ $# == 0 ]] || echo "error: \`$1\` is not a verb" >&2
            usage >&2
            exit 2 ;;
    esac
}

main "$@"
