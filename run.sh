#!/usr/bin/env bash
# Plaintune's front door: `bash run.sh VERB ...`; `bash run.sh` alone lists the verbs.
# It sets .venv up, and starts DeepSpeed's launcher such that Ctrl-C and SIGTERM reach the training ranks.
set -euo pipefail
caller=$PWD  # where training runs: paths, the defaults' too, are relative to it, as for `deepspeed train_sft.py`
cd "$(dirname "${BASH_SOURCE[0]}")"

root=$PWD
python=$root/.venv/bin/python
flash_attn_2="flash-attn==2.8.3"
flash_attn_4=('flash-attn-4[cu13]==4.0.0b36' nvidia-cutlass-dsl==4.8.1 quack-kernels==0.6.5 apache-tvm-ffi==0.1.15.post2)

usage() {
    cat <<'END'
usage: bash run.sh VERB [...]
  sanity                    train a tiny model with SFT, then DPO, talk to both, judge (minutes, no GPU needed)
  sanity sft|dpo [N] [flags]  the real recipe for 100 steps on N GPUs (default 1), judged; output/sanity-sft or -dpo
  sft|dpo [N] [flags]       the full recipe on N GPUs (default: all; without a GPU: 2 CPU processes)
  bench sft|dpo [N] [flags] throughput of a named shape with random weights (--shape llama-8b --steps 10 --lengths tulu|full)
  test [pytest flags]       the test suite
  setup                     make .venv from requirements.txt (the other verbs do it when needed)
    TORCH_INDEX_URL=URL       where torch comes from; the CPU index saves gigabytes
    INSTALL_FLASH_ATTN=1|0    flash-attn, an optional addition: by default version 4's wheels on Hopper; 1: also on
                              Blackwell, and version 2, built by nvcc for tens of minutes, elsewhere; 0: none
Relative paths, the defaults (output/...) too, start where you stand. `bench --help` and `sanity --help` say more.
END
}

fail() {  # a mistake in what was asked for
    echo "error: $*" >&2
    exit 2
}

# ---------------------------------------------------------------------- set-up
find_python() {  # prints the first Python that is new enough
    local name
    for name in python3 python3.11 python3.12 python3.13 python3.14; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    fail "Python 3.11 or newer is needed; python3 is $(python3 -V 2>/dev/null || echo missing)"
}

stamp() {  # what .venv is made from: $1's version and requirements.txt
    { "$1" -VV; cat requirements.txt; } | sha256sum
}

setup() {  # makes .venv; its stamp is written last, so that an interrupted set-up is done over
    local base wanted torch
    base=$(find_python)
    wanted=$(stamp "$base")
    if [[ $(cat .venv/.stamp 2>/dev/null) != "$wanted" ]]; then
        echo "setting up .venv with $("$base" -V) (minutes; the downloads are the longest part)"
        rm -rf .venv
        "$base" -m venv .venv || {
            echo "error: $base cannot make a .venv (on Debian and Ubuntu: apt install python3-venv)" >&2
            exit 1
        }
        torch=$(grep -oE '^torch==[^ #]+' requirements.txt || true)
        if [[ -n $torch ]]; then
            echo "  $torch${TORCH_INDEX_URL:+ from $TORCH_INDEX_URL}"
            pip_install ${TORCH_INDEX_URL:+--no-deps --index-url "$TORCH_INDEX_URL"} "$torch"
        fi
        echo "  the other packages of requirements.txt"
        DS_BUILD_OPS=0 pip_install -r requirements.txt
        if [[ -z ${INSTALL_FLASH_ATTN:-} && $(compute_capability) == 9.* && $(torch_cuda) == 13.* ]]; then
            install_flash_attn
        fi
        echo "$wanted" >.venv/.stamp
        echo "set up: $("$python" -V) in .venv"
    fi
    [[ ${INSTALL_FLASH_ATTN:-0} == 0 ]] || install_flash_attn
}

compute_capability() {  # of the oldest GPU; nothing without one
    { nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true; } | sort -n | head -n 1
}

torch_cuda() {  # the CUDA that torch was built with; nothing for a CPU build
    "$python" -c 'import torch; print(torch.version.cuda or "")' 2>/dev/null || true
}

pip_install() {
    "$python" -m pip install --quiet --disable-pip-version-check "$@" || {
        echo "error: pip could not install $*; see above. The same command starts over" >&2
        exit 1
    }
}

install_flash_attn() {  # an optional addition: no failure of its stops anything
    if "$python" -c 'import flash_attn' 2>/dev/null; then
        return
    fi
    case $(compute_capability) in
        "")
            echo "flash-attn left out: it needs an NVIDIA GPU. torch's own attention is used"
            return ;;
        9.* | 10.*)
            echo "  ${flash_attn_4[0]}"
            "$python" -m pip install --quiet --disable-pip-version-check "${flash_attn_4[@]}" ||
                echo "flash-attn could not be installed and is left out. torch's own attention is used"
            return ;;
    esac
    if ! command -v nvcc >/dev/null; then
        echo "flash-attn left out: for this GPU it is built, which needs nvcc. torch's own attention is used"
        return
    fi
    echo "building $flash_attn_2 (tens of minutes)"
    "$python" -m pip install --quiet --disable-pip-version-check setuptools wheel packaging ninja psutil &&
        "$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation "$flash_attn_2" ||
        echo "flash-attn could not be built and is left out. torch's own attention is used"
}

# ---------------------------------------------------------------------- training
num_gpus() {
    "$python" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)'
}

train() {  # train sft|dpo [N] [flags]
    local script=train_$1.py num_found num_ranks where port
    shift
    num_found=$(num_gpus)
    num_ranks=$((num_found ? num_found : 2))
    if [[ ${1:-} =~ ^[0-9]+$ ]]; then
        num_ranks=$((10#$1))
        shift
    fi
    ((num_ranks > 0)) || fail "a run on 0 GPUs; without a GPU, the number is that of CPU processes"
    ((num_found == 0 || num_ranks <= num_found)) || fail "$num_ranks GPUs asked for, $num_found found"
    where=(--num_gpus "$num_ranks")
    if ((num_found == 0)); then
        export DS_ACCELERATOR=cpu
        echo "no GPU found: $num_ranks CPU processes"
    elif [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then  # which --num_gpus would not heed
        where=(--include "localhost:$(cut -d, -f "1-$num_ranks" <<<"$CUDA_VISIBLE_DEVICES")")
    fi
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    # Nothing of the folder where the user stands is taken for a module, by the ranks' launcher either.
    export PYTHONSAFEPATH=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    launch "$python" -m deepspeed.launcher.runner --quiet "${where[@]}" --master_port "$port" "$root/$script" "$@"
}

say() {
    echo "run.sh: $*" >&2 || true  # the terminal may be gone
}

launch() {  # launch COMMAND...: DeepSpeed's launcher. Returns the ranks' exit code, 143 or 130 when stopped
    local rc
    interrupted="" signalled="" num_signals=0
    export PLAINTUNE_RUN_SH=1  # tells the ranks that a stop waits for their checkpoint
    # A session of its own: a terminal's Ctrl-C then reaches the ranks once, through forward. And SIGINT's
    # default action back, which a script takes from its background commands.
    "$python" -c 'import os, signal, sys
os.setsid()
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.chdir(sys.argv[1])
os.execv(sys.argv[2], sys.argv[2:])' "$caller" "$@" &
    launcher=$!
    trap 'forward TERM' TERM HUP
    trap 'forward INT' INT
    trap '' PIPE  # a Ctrl-C also ends what reads the output: `run.sh ... | tee log`
    while :; do  # a signal ends a wait early; a wait that is repeated tells the exit code again
        interrupted=""
        wait "$launcher" 2>/dev/null && rc=0 || rc=$?  # silent: bash would print the whole command that was killed
        [[ -n $interrupted ]] || break
    done
    stop_strays
    trap - TERM HUP INT PIPE
    case $signalled:$rc in  # 241 and 254: a rank that the signal ended before it could handle it
        TERM:241 | TERM:254) rc=143 ;;
        INT:143 | INT:241 | INT:254) rc=130 ;;
    esac
    return "$rc"
}

forward() {  # passes signal $1 on to the ranks; before there are any, ends the launcher
    local pids
    interrupted=yes
    signalled=$1
    num_signals=$((num_signals + 1))
    mapfile -t pids < <(rank_pids)
    if ((num_signals > 2)); then
        say "asked a third time: killing the run"
        kill -KILL -- "-$launcher" 2>/dev/null || true
    elif ((${#pids[@]})); then
        say "SIG$1 passed on to ${#pids[@]} ranks"
        kill "-$1" "${pids[@]}" 2>/dev/null || true
    else
        kill -TERM -- "-$launcher" 2>/dev/null || kill -TERM "$launcher" 2>/dev/null || true
    fi
}

session_pids() {  # "PID PARENT" of each process of the launcher's session
    local folder line state parent session
    for folder in /proc/[0-9]*; do
        { read -r line <"$folder/stat"; } 2>/dev/null || continue
        read -r state parent _ session _ <<<"${line##*) }"  # what follows the command's name
        [[ $session != "$launcher" || $state == Z ]] || echo "${folder#/proc/} $parent"
    done
}

rank_pids() {  # the ranks: what DeepSpeed's launcher of this node has started
    local pid parent
    while read -r pid parent; do
        if tr '\0' ' ' 2>/dev/null <"/proc/$parent/cmdline" | grep -q ' deepspeed\.launcher\.launch '; then
            echo "$pid"
        fi
    done < <(session_pids)
}

stop_strays() {  # a launcher that is killed leaves its ranks training
    local grace
    for grace in 1 2 3; do
        [[ -n $(session_pids) ]] || return 0
        sleep 0.5
    done
    if [[ -z $signalled ]]; then
        say "the launcher is gone and its processes are not: stopping them"
        forward TERM
    fi
    while [[ -n $(session_pids) ]]; do
        sleep 0.5
    done
}

# ---------------------------------------------------------------------- verbs
run_module() {  # run_module NAME [...]: one of this project's, from where the user stands
    cd "$caller"
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -P -m "$@"  # -P: no module of the user's comes first
}

main() {
    local verb=${1:-}
    shift || true
    case $verb in
        setup)
            setup ;;
        test)
            setup
            [[ $(num_gpus) != 0 ]] || export DS_ACCELERATOR=cpu
            exec "$python" -m pytest -q "${@:-tests}" ;;
        sft | dpo)
            setup
            train "$verb" "$@" ;;
        sanity)
            setup
            run_module common.verbs.sanity "$@" ;;
        bench)
            setup
            [[ $(num_gpus) != 0 ]] || export DS_ACCELERATOR=cpu
            run_module common.verbs.bench "$@" ;;
        help | -h | --help)
            usage ;;
        *)
            [[ -z $verb ]] || echo "error: \`$verb\` is not a verb" >&2
            usage >&2
            exit 2 ;;
    esac
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    main "$@"
fi
