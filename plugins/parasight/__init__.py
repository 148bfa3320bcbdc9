"""Parasight's side of Volatility 3: guests as layers, a kernel's symbols made from its own, the appliance's worker."""
