"""A PVH domain's memory by our own route against LibVMI, in the dom0 of a Xen host that is emulated whole.

The figures are those of an emulated Xen: only their ratio means something. LibVMI is used as we offer it, with the
limits that it changes put back and its cache emptied around each call.
"""

import json
from collections.abc import Iterator

from lab.xen import boot_xen
from tests.bench.lab import Lab, say
from tests.bench.measure import Sample
from tests.bench.report import Line

ROUNDS = 8
WORKS = {"4 KiB all over RAM, in batches": 256, "4 KiB in order, in batches": 256, "8 bytes all over RAM, singly": 48}
# Runs in dom0. The domain's low memory is there whatever it has ballooned out.
SCRIPT = """
import json, random, sys, time
from appliance.hosts.inventory import Inventory
from appliance.routes import open_memory
works, rounds = json.loads(sys.argv[1]), int(sys.argv[2])
with Inventory.of_this_host() as inventory:
    (info,) = inventory.find_guests()
routes = {name: open_memory(info, name, change_domain=True) for name in ("xen", "libvmi")}
taken = {what: {name: [] for name in routes} for what in works}
for number in range(rounds):
    for what, count in works.items():
        first = 4096 * random.randrange(256, 8192)
        places = [4096 * random.randrange(256, 16384) for _ in range(count)]
        for name, memory in routes.items():
            start = time.perf_counter()
            if "8 bytes" in what:
                for gpa in places:
                    memory.read(gpa, 8)
            elif "order" in what:
                memory.readv([(first + 4096 * page, 4096) for page in range(count)])
            else:
                memory.readv([(gpa, 4096) for gpa in places])
            taken[what][name].append((time.perf_counter() - start) / count)
for memory in routes.values():
    memory.close()
print(json.dumps(taken))
"""


def run(lab: Lab) -> Iterator[Line]:
    lab.close()
    rounds = max(2, lab.sizes.rounds * ROUNDS // 9)
    say("booting a Xen host and its domain, some two minutes")
    with boot_xen() as host:
        host.create().wait_booted()
        host.must("ln", "-sf", "libxenstore.so.4", "/usr/lib/x86_64-linux-gnu/libxenstore.so")  # for LibVMI only
        words = ("env", "PYTHONPATH=/opt/parasight:/opt/site", "python3", "-c", SCRIPT, json.dumps(WORKS), str(rounds))
        taken = json.loads(host.must(*words, timeout_s=300).splitlines()[-1])
    for what, samples in taken.items():
        ours, theirs = Sample(samples["xen"]), Sample(samples["libvmi"])
        note = f"{1 / ours.p50:,.0f} a second against {1 / theirs.p50:,.0f}"
        yield Line("xen", what, "us", ours, "LibVMI, on Xen", theirs, at_least=1.0, note=note)
