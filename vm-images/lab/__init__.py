"""The lab: real guests built from Debian packages, booted in QEMU inside network namespaces of their own."""
