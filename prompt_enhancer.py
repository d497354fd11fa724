from skyreels_fast.enhance import main

if __name__ == "__main__":
    raise SystemExit(main())
