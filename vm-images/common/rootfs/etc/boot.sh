#!/bin/sh
# Run once by PID 1. Debian's busybox shell prefers its own applets, hence /usr/bin/ip.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for module in /lib-modules/*.ko; do insmod "$module"; done

for word in $(cat /proc/cmdline); do
    case $word in
        lab.ip4=*) ip4=${word#*=} ;;
        lab.ip6=*) ip6=${word#*=} ;;
        lab.name=*) hostname "${word#*=}" ;;
    esac
done
for scope in all default; do
    echo 0 >/proc/sys/net/ipv6/conf/$scope/accept_dad
    echo 0 >/proc/sys/net/ipv6/conf/$scope/accept_ra
done
/usr/bin/ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
    /usr/bin/ip link set eth0 up
    [ -z "$ip4" ] || /usr/bin/ip addr add "$ip4" dev eth0
    [ -z "$ip6" ] || /usr/bin/ip addr add "$ip6" dev eth0 nodad
fi
echo "lab: booted"
