#!/usr/bin/env bash
# Several processes on this machine, over Gloo or under mpirun. All of them have ended when it ends.
#     run.sh gloo equal|kill|hang|throw PATH/TO/ranks N...    for each N, all at a time
#     run.sh mpi  equal|hang|throw      PATH/TO/ranks N...    the same under mpirun
#     run.sh program N PATH/TO/PROGRAM [ARGUMENT...]          with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
# Exits with 0 where every process did, but for rank 1 where it is killed or hangs. SIGUSR1 sends SIGINT to rank 1.
set -euo pipefail
limit=90  # seconds; a machine that is busy with other things takes its time to load LibTorch
export OMP_NUM_THREADS=1
# mpirun: as root, on fewer cores than ranks, in a container, without ssh.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 \
  OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_btl_vader_single_copy_mechanism=none OMPI_MCA_plm=isolated
folder=$(mktemp -d)
groups=()  # process groups, of which a `timeout` leads one each, in a session of its own
end() {
  local group
  for group in "${groups[@]}"; do kill -KILL -- "-$group" 2>/dev/null || true; done
  rm -rf "$folder"
}
trap end EXIT
trap 'exit 143' TERM

start() {
  setsid timeout --foreground -s KILL "$limit" "$@" &  # without --foreground it hands on each signal twice
  groups+=($!)
}

# free_port: one that nobody listens at.
free_port() {
  local port
  for _ in {1..50}; do
    port=$((20000 + RANDOM % 10000))
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
  return 1
}

# ranks N COMMAND...: starts N of them.
ranks() {
  local n=$1 rank
  shift
  for ((rank = 0; rank < n; ++rank)); do
    RANK=$rank WORLD_SIZE=$n start "$@"
  done
}

case "$1" in
  program)
    n=$2
    shift 2
    MASTER_PORT=$(free_port)
    export MASTER_ADDR=127.0.0.1 MASTER_PORT
    ranks "$n" "$@"
    trap 'kill -INT "${groups[1]}"' USR1  # to timeout, which hands it on
    code=0
    for group in "${groups[@]}"; do
      status=138
      while [ "$status" = 138 ]; do  # it was SIGUSR1 that ended the waiting
        status=0
        wait "$group" || status=$?
      done
      code=$((status > code ? status : code))
    done
    exit "$code"
    ;;
  gloo | mpi)
    engine=$1 mode=$2 program=$3
    shift 3
    for n in "$@"; do
      if [ "$engine" = mpi ]; then
        start "${MPIEXEC:-mpirun}" -np "$n" "$program" mpi - "$mode" >"$folder/$n.out" 2>&1
      else
        ranks "$n" "$program" gloo "$folder/$n.store" "$mode" >>"$folder/$n.out" 2>&1
      fi
    done
    code=0
    for n in "$@"; do
      # Rank 1 is waited for by nobody where it hangs, and mpirun itself fails then.
      expected=$([ "$mode" = kill ] || [ "$mode" = hang ] && echo $((n - 1)) || echo "$n")
      for ((tick = 0; tick < 2 * limit; ++tick)); do
        right=$(grep -c 'as it should be' "$folder/$n.out" || true)
        if [ "$right" -ge "$expected" ] || grep -q '^error' "$folder/$n.out"; then break; fi
        sleep 0.5
      done
      sed "s/^/$engine, $n ranks: /" "$folder/$n.out"
      [ "$right" = "$expected" ] || code=1
    done
    case "$engine $mode" in
      *equal | *throw) for group in "${groups[@]}"; do wait "$group" || code=$?; done ;;
      mpi*) wait "${groups[@]}" || true ;;  # it ends its ranks itself
    esac
    exit "$code"
    ;;
esac
