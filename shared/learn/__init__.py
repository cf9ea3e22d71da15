"""What is learned while the system runs, used by several services and the simulator. Pure: state in, state out."""
