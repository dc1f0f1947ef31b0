//! The header and the libraries, from C and C++. Needs `cc` and `c++`, as building Rust does.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{repository, text_model};

/// What `rustc --print native-static-libs` names.
#[cfg(target_os = "linux")]
const SYSTEM_LIBS: &[&str] = &["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl", "-lc"];
#[cfg(target_os = "macos")]
const SYSTEM_LIBS: &[&str] = &["-framework", "CoreFoundation", "-lSystem", "-lc", "-lm"];

const STRICT: [&str; 4] = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"];

/// Where cargo has put the libraries beside this test.
fn libraries() -> PathBuf {
    env::current_exe().unwrap().parent().unwrap().to_owned()
}

/// Runs a program to its end; its output, or a failed test that shows what it said.
fn run(program: impl AsRef<OsStr>, arguments: &[&OsStr]) -> String {
    let done = Command::new(&program).args(arguments).output();
    let done = done.unwrap_or_else(|e| panic!("{}: {e}", program.as_ref().display()));
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{} {arguments:?}:\n{errors}", program.as_ref().display());
    String::from_utf8(done.stdout).unwrap()
}

/// Compiles the C test with `compiler` and what is to be linked; the program.
fn compile(name: &str, compiler: &str, flags: &[&str], link: &[&OsStr]) -> PathBuf {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let (include, source) = (repository("bindings/include"), repository("bindings/ctest/test.c"));
    let mut arguments: Vec<&OsStr> = STRICT.iter().chain(flags).map(OsStr::new).collect();
    arguments.extend([OsStr::new("-I"), include.as_os_str(), source.as_os_str()]);
    // What follows a source forced to be C++ would be taken for C++, too.
    arguments.extend(["-x", "none", "-o"].map(OsStr::new));
    arguments.push(program.as_os_str());
    arguments.extend(link);
    run(compiler, &arguments);
    program
}

fn shared_library() -> PathBuf {
    libraries().join(format!("{}engine_c{}", env::consts::DLL_PREFIX, env::consts::DLL_SUFFIX))
}

#[test]
fn a_c_program_uses_the_shared_library() {
    let program = compile("abi-shared", "cc", &["-std=c89"], &[shared_library().as_os_str()]);
    run(program, &["run".as_ref(), text_model("shared").as_os_str()]);
}

#[test]
fn a_c_program_uses_the_static_library() {
    let library = libraries().join("libengine_c.a");
    let mut link = vec![library.as_os_str()];
    link.extend(SYSTEM_LIBS.iter().map(OsStr::new));
    let program = compile("abi-static", "cc", &["-std=c99"], &link);
    run(program, &["run".as_ref(), text_model("static").as_os_str()]);
}

#[test]
fn a_cpp_program_uses_the_shared_library() {
    let library = shared_library();
    let program = compile("abi-cpp", "c++", &["-std=c++98", "-x", "c++"], &[library.as_os_str()]);
    run(program, &["run".as_ref(), text_model("cpp").as_os_str()]);
}

#[test]
fn c_lays_the_structs_out_as_the_library_does() {
    let mut expected = String::new();
    let mut add = |name: &str, fields: &[(&str, usize)], size: usize| {
        for (field, offset) in fields {
            expected += &format!("{name}.{field} {offset}\n");
        }
        expected += &format!("{name} {size}\n");
    };
    add("engine_config", engine_c::Config::FIELDS, size_of::<engine_c::Config>());
    add("engine_sampling", engine_c::Sampling::FIELDS, size_of::<engine_c::Sampling>());
    add("engine_token", engine_c::Token::FIELDS, size_of::<engine_c::Token>());
    add("engine_output", engine_c::Output::FIELDS, size_of::<engine_c::Output>());
    let program = compile("abi-layout", "cc", &["-std=c89"], &[shared_library().as_os_str()]);
    assert_eq!(run(program, &["layout".as_ref()]), expected);
}

/// The functions that the header declares.
fn declared() -> BTreeSet<String> {
    let header = fs::read_to_string(repository("bindings/include/engine.h")).unwrap();
    let declarations = header.lines().filter(|line| line.starts_with("ENGINE_API "));
    let name =
        |line: &str| line.split('(').next()?.split([' ', '*']).next_back().map(str::to_owned);
    declarations.filter_map(name).collect()
}

#[cfg(target_os = "linux")]
#[test]
fn the_shared_library_exports_what_the_header_declares_and_no_more() {
    let symbols =
        run("nm", &["-D".as_ref(), "--defined-only".as_ref(), shared_library().as_os_str()]);
    let exported = symbols.lines().filter_map(|line| line.split(' ').next_back());
    let exported: BTreeSet<String> = exported.map(str::to_owned).collect();
    assert_eq!(exported, declared());
    assert_eq!(exported.len(), 11);
}

#[test]
fn statuses_are_those_of_the_header() {
    let header = fs::read_to_string(repository("bindings/include/engine.h")).unwrap();
    let statuses = [
        ("ENGINE_OK", engine_c::ENGINE_OK),
        ("ENGINE_ERR_INTERNAL", engine_c::ENGINE_ERR_INTERNAL),
        ("ENGINE_ERR_ARGUMENT", engine_c::ENGINE_ERR_ARGUMENT),
        ("ENGINE_ERR_HANDLE", engine_c::ENGINE_ERR_HANDLE),
        ("ENGINE_ERR_BUFFER", engine_c::ENGINE_ERR_BUFFER),
        ("ENGINE_ERR_MODEL", engine_c::ENGINE_ERR_MODEL),
        ("ENGINE_ERR_UNSUPPORTED", engine_c::ENGINE_ERR_UNSUPPORTED),
        ("ENGINE_ERR_CONFIG", engine_c::ENGINE_ERR_CONFIG),
        ("ENGINE_ERR_REQUEST", engine_c::ENGINE_ERR_REQUEST),
        ("ENGINE_ERR_BUSY", engine_c::ENGINE_ERR_BUSY),
        ("ENGINE_ERR_GENERATION", engine_c::ENGINE_ERR_GENERATION),
        ("ENGINE_ERR_IO", engine_c::ENGINE_ERR_IO),
    ];
    let listed = header.lines().filter_map(|line| {
        let (name, value) = line.trim().trim_end_matches(',').split_once(" = ")?;
        let is_status = name == "ENGINE_OK" || name.starts_with("ENGINE_ERR_");
        is_status.then(|| (name, value.parse::<i32>().unwrap()))
    });
    assert_eq!(listed.collect::<Vec<_>>(), statuses);
}
