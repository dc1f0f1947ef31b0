//! `engine score`: log-probabilities of given tokens, by the path of rollouts or by that of training.

use engine::text::AddSpecial;
use engine::{Engine, Score};
use serde::Serialize;
use serde_json::Value;
use server::BadField;

use crate::args::{ScoreArgs, ScorePath};
use crate::exit::{Failure, Result};
use crate::input::{Input, Line};
use crate::model;
use crate::output::Output;
use crate::progress::Progress;
use crate::signals::Signals;
use crate::terminal::Terminal;

/// Texts scored together, at most.
const BATCH_TEXTS: usize = 64;
/// Tokens scored together, unless one text alone has more.
const BATCH_TOKENS: usize = 16_384;

/// Runs the command.
pub(crate) fn run(args: ScoreArgs, terminal: &Terminal) -> Result<()> {
    let path = args.input.as_ref();
    let path = path.ok_or_else(|| Failure::usage("--input IN.jsonl is missing"))?;
    let input = Input::read(path)?;
    let signals = Signals::listen()?;
    let config = model::engine_config(&args.common, &args.engine)?;
    if args.path == ScorePath::Train && config.kv_dtype.is_some() {
        return Err(Failure::usage("--kv-cache-dtype is int8, limit is auto with --path train"));
    }
    let mut engine = model::load(&args.model, &config, terminal)?;
    let texts =
        input.lines().map(|line| read(&input, line?, &engine)).collect::<Result<Vec<_>>>()?;
    let mut output = match &args.output {
        Some(path) => Output::replace(path)?,
        None => Output::stdout(),
    };
    let mut progress = Progress::new(terminal, "texts", texts.len());
    let (mut done, mut tokens) = (0, 0);
    while done < texts.len() {
        if signals.asked() {
            let total = texts.len();
            return Err(Failure::interrupted(format!(
                "interrupted with {done} of {total} texts done"
            )));
        }
        let batch = batch(&texts[done..]);
        for (text, score) in batch.iter().zip(scores(&mut engine, args.path, batch)?) {
            output.line(&record(text, &score));
        }
        output.flush()?;
        done += batch.len();
        tokens += batch.iter().map(|text| text.tokens.len()).sum::<usize>();
        progress.update(done, tokens);
    }
    output.finish()?;
    progress.finish(done, tokens);
    Ok(())
}

/// One line of the input.
struct Text {
    index: usize,
    id: Option<Value>,
    tokens: Vec<u32>,
    temperature: f32,
}

fn read(input: &Input, line: Line, engine: &Engine) -> Result<Text> {
    let Line { index, mut fields } = line;
    let bad = |bad: BadField| input.bad(index, &bad);
    let id = fields.take("id");
    let temperature = fields.number("temperature").map_err(bad)?.unwrap_or(1.0);
    let given = (fields.tokens("token_ids").map_err(bad)?, fields.string("text").map_err(bad)?);
    let tokens = match given {
        (Some(tokens), None) => tokens,
        (None, Some(text)) => {
            let missing =
                || BadField::new("text", "has text, which the model has no tokenizer for");
            let tokenizer = engine.tokenizer().ok_or_else(|| bad(missing()))?;
            let encoded = tokenizer.encode(&text, AddSpecial::Yes);
            encoded.map_err(|error| input.refused(index, error))?
        }
        _ => {
            let message = "has not exactly one of token_ids and text";
            return Err(bad(BadField::new("text", message)));
        }
    };
    engine
        .check_scored(std::slice::from_ref(&tokens), temperature)
        .map_err(|error| input.refused(index, error))?;
    Ok(Text { index, id, tokens, temperature })
}

/// The texts at the front that are scored together: one temperature, a bounded number of tokens.
fn batch(texts: &[Text]) -> &[Text] {
    let mut tokens = 0;
    let fits = |text: &&Text| {
        tokens += text.tokens.len();
        text.temperature == texts[0].temperature && tokens <= BATCH_TOKENS
    };
    let len = texts.iter().take(BATCH_TEXTS).take_while(fits).count();
    &texts[..len.max(1)]
}

fn scores(engine: &mut Engine, path: ScorePath, batch: &[Text]) -> Result<Vec<Score>> {
    let sequences: Vec<Vec<u32>> = batch.iter().map(|text| text.tokens.clone()).collect();
    let temperature = batch[0].temperature;
    Ok(match path {
        ScorePath::Rollout => engine.score(&sequences, temperature)?,
        ScorePath::Train => trainer::score_train_path(engine, &sequences, temperature)?,
    })
}

/// A result, as it stands in the output.
#[derive(Serialize)]
struct Record<'a> {
    index: usize,
    id: Option<&'a Value>,
    token_ids: &'a [u32],
    /// Nothing is known of the first token.
    logprobs: Vec<Option<f32>>,
    entropy: &'a [f32],
    logprob_bits: Vec<Option<u32>>,
    sum: f64,
}

fn record<'a>(text: &'a Text, score: &'a Score) -> Record<'a> {
    let known = || score.logprobs.iter().copied();
    Record {
        index: text.index,
        id: text.id.as_ref(),
        token_ids: &text.tokens,
        logprobs: [None].into_iter().chain(known().map(Some)).collect(),
        entropy: &score.entropy,
        logprob_bits: [None].into_iter().chain(known().map(|x| Some(x.to_bits()))).collect(),
        sum: known().map(f64::from).sum(),
    }
}
