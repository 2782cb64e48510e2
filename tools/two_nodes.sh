#!/bin/bash
# Train on two machines that this one plays: two network namespaces joined by a cable, one process in each.
#
#     sudo tools/two_nodes.sh [PYTHON]
#
# As on Debian and Ubuntu, each machine's own name stands for 127.0.1.1 in its /etc/hosts. Shown:
#   1. gloo gives the others that address, so that they do not find it
#   2. with GLOO_SOCKET_IFNAME the same command trains
#   3. one machine's processes are killed: how soon the other ends, and what it says
#   4. one machine loses its network: the other waits for src.distributed.TIMEOUT, here 30 s
#   5. one process is killed under --max-restarts: all start again from the last checkpoint
# It takes two to six minutes, leaves nothing behind, and ends with status 1 if something else was seen.
set -u
python=$(command -v "${1:-python}") || { echo "error: ${1:-python}: no such Python; give its path" >&2; exit 2; }
[ "$(id -u)" = 0 ] || { echo "error: network namespaces need root: use sudo" >&2; exit 2; }
cd "$(dirname "$0")/.." || exit 2
! ip netns list | grep -q ssd-node || { echo "error: ssd-node0 exists: wait for the other two_nodes.sh" >&2; exit 2; }
work=$(mktemp -d)
nodes="ssd-node0 ssd-node1"
failed=0
restarts=0

clean_up() {
    for node in $nodes; do
        ip netns pids $node 2>/dev/null | xargs -r kill -9
        ip netns del $node 2>/dev/null
        rm -rf /etc/netns/$node
    done
    rmdir --ignore-fail-on-non-empty /etc/netns 2>/dev/null
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

for i in 0 1; do
    ip netns add ssd-node$i || exit 1
    mkdir -p /etc/netns/ssd-node$i # "ip netns exec" lays these files over those of /etc
    printf '127.0.0.1 localhost\n127.0.1.1 ssd-node%d\n10.77.0.%d ssd-node%d\n' $i $((2 - i)) $((1 - i)) >/etc/netns/ssd-node$i/hosts
done
ip link add eth0 netns ssd-node0 type veth peer name eth0 netns ssd-node1 || exit 1
for i in 0 1; do
    ip -n ssd-node$i addr add 10.77.0.$((i + 1))/24 dev eth0
    ip -n ssd-node$i link set lo up
    ip -n ssd-node$i link set eth0 up
done

"$python" -m demo.shapes "$work/data" --train 8 --val 2 >/dev/null || exit 1
cat >"$work/train.py" <<EOF
"""train.py, but with a short patience."""
import datetime
import sys

sys.path.insert(0, "$PWD")
import train
from src import distributed, usage

distributed.TIMEOUT = datetime.timedelta(seconds=30)
usage.run(train.main)
EOF

# node I VARIABLES EPOCHS: become the command that README gives, on machine I
node() {
    exec ip netns exec ssd-node$1 unshare --uts sh -c 'hostname $0; exec "$@"' ssd-node$1 \
        env CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $2 "$python" \
        -m torch.distributed.run --max-restarts=$restarts --nnodes=2 --nproc_per_node=1 --rdzv-backend=c10d --rdzv-endpoint=ssd-node0:29500 \
        "$work/train.py" --data-path "$work/data" --model ssdlite --no-pretrained-backbone --batch-size 2 \
        --epochs $3 --num-workers 0 --save-folder "$work/saved" --log-path "$work/log" >"$work/$1.txt" 2>&1
}

# both VARIABLES EPOCHS: start it on both, as jobs $first and $second
both() {
    rm -rf "$work/saved"
    node 0 "$1" $2 & first=$!
    node 1 "$1" $2 & second=$!
}

# expect PATTERN FILE...: what should be in one of them
expect() {
    grep -qh "$1" "${@:2}" && return
    echo "   NOT SEEN: $1"
    failed=1
}

# When an epoch has been saved, run "$@" and tell how long machine 0 then takes to end, and its words
then_what() {
    until [ -e "$work/saved/ssdlite.pth" ] || ! kill -0 $first 2>/dev/null; do sleep 0.1; done
    sleep 1
    "$@"
    local begun=$SECONDS
    wait $first
    echo "   machine 0 ended with status $? after $((SECONDS - begun)) s:"
    grep -o 'error: .*' "$work/0.txt" | sed 's/^/   /'
}

echo "1. without GLOO_SOCKET_IFNAME"
both UNUSED= 1
wait $first
echo "   status $?: $(grep -h '^error' "$work"/[01].txt | head -1)"
wait $second
expect 'processes do not reach each other' "$work"/[01].txt

echo "2. with GLOO_SOCKET_IFNAME=eth0"
both GLOO_SOCKET_IFNAME=eth0 1
wait $first
status=$?
wait $second
echo "   status $status and $?: $(grep 'epochs done' "$work/0.txt")"
expect 'epochs done' "$work/0.txt"

kill_processes() {
    disown $second # else bash reports its end
    ip netns pids ssd-node1 | xargs -r kill -9
}
cut_off() {
    disown $second
    ip -n ssd-node1 link set eth0 down
}

echo "3. kill -9 of all that runs on machine 1"
both GLOO_SOCKET_IFNAME=eth0 999
then_what kill_processes
expect 'no answer from rank 1' "$work/0.txt"

echo "4. machine 1 loses its network"
both GLOO_SOCKET_IFNAME=eth0 999
then_what cut_off
expect 'no answer from rank 1' "$work/0.txt"
ip netns pids ssd-node1 | xargs -r kill -9
ip -n ssd-node1 link set eth0 up

kill_one_process() {
    for pid in $(ip netns pids ssd-node1); do
        tr '\0' ' ' <"/proc/$pid/cmdline" | grep -q ' -u .*train.py' && kill -9 "$pid" && return
    done
}

echo "5. kill -9 of the process on machine 1, under --max-restarts"
restarts=3
both "GLOO_SOCKET_IFNAME=eth0 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" 8
then_what kill_one_process
wait $second
echo "   $(grep -c 'resuming from' "$work/0.txt") restart: $(grep 'epochs done' "$work/0.txt")"
expect 'resuming from' "$work/0.txt"
expect 'epochs done' "$work/0.txt"
exit $failed
