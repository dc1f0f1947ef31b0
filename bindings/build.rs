//! Links the shared library so that it exports the functions of `include/engine.h` and no others: a
//! dependency that has a C interface of its own keeps it to itself. Leaves out systems without GNU options.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,--exclude-libs,ALL");
    }
}
