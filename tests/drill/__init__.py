"""A server under failure: killed, drained, out of disk, badly asked, worn; judged by what clients receive."""
