#!/bin/sh
# Run once in dom0: Xen's daemons, and a bridge with the world behind it in a network namespace.
export PATH=/usr/lib/xen-4.17/bin:/usr/sbin:/usr/bin:/sbin:/bin
ip=/usr/bin/ip # busybox's shell prefers its own
mkdir -p /var/lib/xenstored /var/lib/xen /var/log/xen/console /run/xen /run/xenstored /run/lock
rm -rf /var/run /var/lock
ln -s /run /var/run
ln -s /run/lock /var/lock
mount -t xenfs xenfs /proc/xen
xenstored --pid-file /run/xenstored.pid
xen-init-dom0
xenconsoled --log=guest --log-dir=/var/log/xen/console --pid-file=/run/xenconsoled.pid

$ip link add xenbr0 type bridge mcast_snooping 0 stp_state 0 forward_delay 0
$ip netns add world
$ip link add world0 type veth peer name eth0 netns world
$ip link set world0 master xenbr0 up
$ip link set xenbr0 up
for scope in all default; do $ip netns exec world sysctl -qw net.ipv6.conf.$scope.accept_dad=0; done
$ip -n world link set lo up
$ip -n world addr add 10.77.0.1/24 dev eth0
$ip -n world addr add fd77::1/64 dev eth0 nodad
$ip -n world link set eth0 up
echo "lab: dom0 is up"
