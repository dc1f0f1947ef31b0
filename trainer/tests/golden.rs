//! The golden vectors of the RL math and of the verifiers, from both reference code bases.
//!
//! Every `*.json` directly under `tests/data/golden` of the workspace, or under `ENGINE_GOLDEN_DIR`, so
//! that further vectors can be dropped in; formats in its README. A file is judged by the check whose name
//! its own name begins with. Every case is compared in f64 and in f32; a file, a field or a kind of case
//! that is not known here fails. Denominators here are exact, those of the references carry +1e-8, so
//! aggregated numbers agree to 1e-6 in f64 and per-token numbers to 1e-9.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "golden/advantage.rs"]
mod advantage;
#[path = "golden/agg.rs"]
mod agg;
#[path = "golden/common.rs"]
mod common;
#[path = "golden/correction.rs"]
mod correction;
#[path = "golden/entropy.rs"]
mod entropy;
#[path = "golden/kl.rs"]
mod kl;
#[path = "golden/losses.rs"]
mod losses;
#[path = "golden/misc.rs"]
mod misc;
#[path = "golden/more_losses.rs"]
mod more_losses;
#[path = "golden/verifiers.rs"]
mod verifiers;

use serde_json::Value;

/// The check of the cases of a file of this name.
fn check(name: &str) -> Option<fn(&[Value])> {
    Some(match name {
        _ if name.starts_with("agg_loss") => agg::aggregation_modes,
        _ if name.starts_with("entropy") => entropy::entropies,
        _ if name.starts_with("extra_advantages") => advantage::other_estimators,
        _ if name.starts_with("extra_misc") => misc::kinds,
        _ if name.starts_with("extra_policy_losses_tis") => more_losses::losses_and_correction,
        _ if name.starts_with("grpo_advantage") => advantage::grpo_advantages,
        _ if name.starts_with("kl_estimators") => kl::kl_estimators,
        _ if name.starts_with("math_dapo") => verifiers::math_dapo,
        _ if name.starts_with("policy_loss_clip_cov") => losses::clip_cov,
        _ if name.starts_with("policy_loss_kl_cov") => losses::kl_cov,
        _ if name.starts_with("policy_loss_vanilla") => losses::vanilla,
        _ if name.starts_with("prime_math") => verifiers::prime_math,
        _ => return None,
    })
}

#[test]
fn every_case_of_every_file() {
    let files = common::files();
    assert!(!files.is_empty(), "no vectors in {}", common::folder().display());
    for file in files {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let check = check(&name).unwrap_or_else(|| panic!("{name}: a file of an unknown kind"));
        let cases = common::cases(&file);
        check(&cases);
        println!("{name}: {} cases", cases.len());
    }
}

#[test]
fn the_vectors_of_the_repository_are_all_there() {
    if std::env::var_os("ENGINE_GOLDEN_DIR").is_none() {
        assert_eq!(common::files().len(), 12);
    }
    assert!(check("unheard_of.json").is_none());
}
