from skyreels_fast.cli import generate_video

if __name__ == "__main__":
    raise SystemExit(generate_video())
