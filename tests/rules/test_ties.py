"""Ties are found as if every profile were compared with every other one, but quickly."""

import random
import time
from itertools import combinations

import pytest
import yaml

from appliance.errors import RuleError
from appliance.rules import lint, load_text
from appliance.rules.compile import conditions_of
from appliance.rules.schema import MATCHING

IMAGES = [
    "/opt/a/*",
    "/opt/b/*",
    "/OPT/a/*",
    "**/nginx",
    "**/bin/nginx",
    "**\\nginx",
    "/opt/**/nginx",
    "**",
    "/*/x?",
    "**/x",
]
CHOICES = {
    "name": ["nginx", "NGINX", "sshd", "ssh*", "?shd"],
    "service": ["nginx.service", "nginx", "cron", "c*"],
    "user": ["root", 0, 33, "www-data", "WWW-data", "bob"],
    "parent": ["/usr/bin/bash", "/usr/bin/*", "bash", "sh", "/USR/bin/bash"],
    "container": [True, False, "web", "WEB", "db*"],
    "deleted": [True, False],
}


def candidates(seed):
    """Random ways to match, as if all of them were equally specific."""
    chosen = random.Random(seed)
    found = []
    for number in range(60):
        match = {"image": chosen.sample(IMAGES, chosen.randint(1, 2))} if chosen.random() < 0.7 else {}
        for key in chosen.sample(sorted(CHOICES), chosen.randint(0 if match else 1, 3)):
            many = chosen.sample(CHOICES[key], chosen.randint(1, 2))
            match[key] = many[0] if key == "deleted" else many
        for image, conditions in conditions_of(MATCHING.validate_python(match)):
            if image is None or not image.literal:
                found.append(lint._Candidate(None, (number,), str(number), None, None, conditions, image))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_no_pair_that_can_meet_is_left_out(seed):
    group = candidates(seed)
    everything = [(a, b) for a, b in combinations(group, 2) if lint._tie(a, b)]
    chosen = list(lint._pairs(group))
    assert len(chosen) < len(group) * (len(group) - 1) / 2
    assert [(a, b) for a, b in chosen if lint._tie(a, b)] == everything


def document(matches):
    profiles = [{"name": f"p{i}", "match": match, "default": "deny"} for i, match in enumerate(matches)]
    head = {"apiVersion": "v1", "kind": "RuleSet", "metadata": {"name": "many", "version": "1"}}
    return yaml.safe_dump({**head, "spec": {"processes": profiles}})


@pytest.mark.parametrize(
    "match",
    [
        lambda i: {"image": [f"/opt/app{i:04}/**"]},
        lambda i: {"image": [f"**/prog{i:04}"]},
        lambda i: {"image": ["/usr/bin/python3"], "service": [f"s{i}"]},
        lambda i: {"parent": [f"/usr/bin/p{i}"]},
    ],
)
def test_a_thousand_profiles_load_in_a_moment(match):
    text = document([match(i) for i in range(1000)])
    start = time.process_time()
    load_text(text)
    assert time.process_time() - start < 20  # less than one on an idle machine; pair by pair it took up to fifty


def test_a_thousand_ties_are_one_mistake():
    with pytest.raises(RuleError) as caught:
        load_text(document([{"name": ["same"]} for _ in range(200)]))
    assert len(caught.value.problems) == lint.MAX_TIES + 1
    lines = str(caught.value).splitlines()
    assert len(lines) == 201
    assert lines[-1] == f"and {lint.MAX_TIES + 1 - 200} more"
