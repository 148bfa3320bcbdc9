"""The guest eye for Windows, x86 and x86-64: from XP's tcpip tables to Server 2022 and Windows 11."""
