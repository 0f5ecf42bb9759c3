"""What several test files share: blocks, inputs, checks, devices, small whole models. No test is in here."""
