"""``python -m appliance.cli`` is the command ``parasight``."""

from appliance.cli import main

main()
