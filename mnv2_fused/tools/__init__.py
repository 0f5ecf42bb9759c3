"""What the command line runs: costs, demonstrations, benchmarks."""
