#!/bin/sh
# Xen's network card comes some time after its driver; what boot.sh does for a card that is there at once.
for word in $(cat /proc/cmdline); do
    case $word in
        lab.ip4=*) ip4=${word#*=} ;;
        lab.ip6=*) ip6=${word#*=} ;;
    esac
done
tries=0
until [ -e /sys/class/net/eth0 ] || [ $((tries += 1)) -gt 100 ]; do sleep 0.2; done
/usr/bin/ip link set eth0 up
/usr/bin/ip addr replace "$ip4" dev eth0
/usr/bin/ip addr replace "$ip6" dev eth0 nodad
