"""The ports of `llava-steering serve`: free ones, and what is said where one is not."""

from __future__ import annotations

import re
import socket

import pytest
from ports import free_port

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.serving.options import ServeOptions
from llava_steering_plugin.serving.ports import find_ports


def test_a_host_that_is_not_this_machines_is_said_with_the_flag_that_names_it() -> None:
    with pytest.raises(ArgumentsError) as refused:
        find_ports(ServeOptions(base="no/model", host="192.0.2.1"))
    assert re.search(r"the page cannot listen on 192\.0\.2\.1: .*\. Give another --host\.$", str(refused.value))
    with pytest.raises(ArgumentsError, match=r"192\.0\.2\.1:7861: .*\. Give another --host or --page-port\.$"):
        find_ports(ServeOptions(base="no/model", host="192.0.2.1", page_port=7861))


def test_the_worker_has_a_host_of_its_own() -> None:
    port = free_port()
    assert find_ports(ServeOptions(base="no/model", api_host="0.0.0.0", worker_port=port))["worker"] == port
    with pytest.raises(ArgumentsError, match=r"the worker .* 192\.0\.2\.1: .*\. Give another --api-host\.$"):
        find_ports(ServeOptions(base="no/model", api_host="192.0.2.1"))


def test_a_port_that_is_given_to_two_programs_is_refused() -> None:
    port = free_port()
    with pytest.raises(ArgumentsError, match=rf"--controller-port, --worker-port: all are {port}\."):
        find_ports(ServeOptions(base="no/model", controller_port=port, worker_port=port))


@pytest.mark.parametrize("host", ["::1", "[::1]", "::"])
def test_the_page_may_be_on_an_ipv6_address(host: str) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    port = free_port()
    assert find_ports(ServeOptions(base="no/model", host=host, page_port=port))["page"] == port
    assert len(set(find_ports(ServeOptions(base="no/model", host=host)).values())) == 3


def test_all_ports_that_are_taken_are_named_at_once() -> None:
    with socket.socket() as one, socket.socket() as other:
        for taken in (one, other):
            taken.bind(("127.0.0.1", 0))
            taken.listen()
        ports = {"controller_port": one.getsockname()[1], "worker_port": other.getsockname()[1]}
        with pytest.raises(ArgumentsError, match=r"(?s)Give another --controller-port.*Give another --worker-port"):
            find_ports(ServeOptions(base="no/model", **ports))
