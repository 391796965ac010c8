"""Tests on several hosts: network namespaces of this machine (:mod:`cluster.lab`)."""
