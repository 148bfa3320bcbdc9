#!/bin/sh
# Start the web server (a master and two workers, port 80, IPv4 and IPv6) and return when it listens.
set -e
mkdir -p /var/log/nginx /var/lib/nginx /run
/usr/sbin/nginx -c /opt/demo/nginx.conf
for _ in 1 2 3 4 5 6 7 8 9 10; do
    [ "$(pgrep -c -P "$(cat /run/nginx.pid)")" = 2 ] && exit 0
    sleep 0.2
done
echo "nginx has no workers" >&2
exit 1
