"""The tap in the kernel: a tc program counts and follows flows, user space hears only of what matters."""
