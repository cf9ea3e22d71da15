"""The monitor's deciders: admission and QoS windows."""
