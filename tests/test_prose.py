"""The words of the code: docstrings of functions start with a verb; those of classes and modules say what they are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import hybridkv

ROOT = Path(hybridkv.__file__).parent
LAB = Path(__file__).parent.parent / "lab/src/hybridkv_lab"
VERBS = frozenset(
    """
    Abort Accept Add Adjust Advance Align Allocate Answer Append Apply Arrange Ask Assemble Assert Assign Attach
    Attend Average Await Begin Bind Blank Bound Bring Broadcast Build Call Cancel Capture Change Check Choose
    Clamp Clear Climb Close Collect Combine Compare Compile Compute Configure Connect Continue Convert Convolve
    Copy Correct Count Cover Create Cut Decide Declare Decode Deduplicate Define Delete Deploy Dequantize Derive
    Describe Detach Detect Determine Digest Disable Discard Divide Do Draw Drop Embed Enable Encode End Enforce
    Ensure Enter Enumerate Erase Escape Estimate Evaluate Evict Execute Expand Explain Export Extend Extract
    Fail Fetch Fill Filter Find Finish Fit Flatten Flush Fold Follow Forbid Forget Format Forward Free Freeze
    Gate Gather Generate Get Give Greet Group Guess Halve Hand Handle Hash Have Hold Identify Ignore Import
    Include Increase Infer Initialize Insert Inspect Install Interleave Invert Iterate Join Keep Label Launch
    Leave Let Limit List Load Locate Lock Look Lower Make Map Mark Mask Match Measure Merge Mix Move Multiply
    Name Narrow Negate Normalize Note Notify Obtain Omit Open Order Pack Pad Pair Parse Pass Patch Pick Place
    Plan Plot Poison Poll Predict Prefetch Prepare Prevent Print Probe Process Project Propose Publish Pull Push
    Put Quantize Query Queue Quote Raise Rank Read Rebuild Recompute Record Recover Reduce Refuse Register
    Reject Release Reload Relock Remember Remove Rename Render Reorder Repack Repeat Replace Replay Reply Report
    Require Reserve Reset Reshape Resolve Restore Restrict Resume Return Reuse Reverse Rewrite Rotate Round Run
    Sample Sanitize Save Say Scale Scan Schedule Score Search See Select Send Serve Set Shard Share Shift
    Shorten Show Shrink Shut Sign Silence Simulate Skip Sleep Slice Slide Smooth Solve Sort Spell Split Spread Stack
    Start Step Stop Store Stream Stretch Strip Submit Subtract Suggest Sum Summarize Suspend Swap Switch
    Synchronize Tabulate Tag Take Tell Test Tile Time Tokenize Trace Track Train Transfer Transform Translate
    Transpose Trim Truncate Try Tune Turn Type Undo Unify Unpack Unregister Unwrap Update Upload Use Validate
    Verify View Visit Wait Walk Warm Warn Watch Weigh Widen Wrap Write Yield
    """.split()  # noqa: SIM905 - words read better than a list of strings
)
"""Verbs that may open a docstring. Another verb may join them; a noun, an article or a question word may not."""


def docstrings() -> Iterator[tuple[str, str]]:
    """Give every function of the package, by file and name, with its docstring; a property's may name what it is."""
    for path in sorted([*ROOT.rglob("*.py"), *LAB.rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            is_property = any(ast.unparse(each).endswith("property") for each in node.decorator_list)
            if not is_property and (text := ast.get_docstring(node)):
                yield f"{path.name}:{node.lineno} {node.name}", text


def opening(docstring: str) -> str:
    """Return the first word of a docstring, without what ends a phrase."""
    return docstring.split()[0].rstrip(",:;.")


def test_docstrings_say_what_a_function_does() -> None:
    """`Check whether ...`, `Return the ...`: the reader does not have to assemble the verb."""
    found = [f"{place}: {text.splitlines()[0]}" for place, text in docstrings() if opening(text) not in VERBS]
    assert not found, "\n".join(found)
    assert len(list(docstrings())) > 1000


def test_the_list_of_verbs_has_verbs_alone() -> None:
    """No article, question word or plural gets in, and a docstring that opens with one is found."""
    others = {
        "A",
        "An",
        "All",
        "As",
        "At",
        "Each",
        "Every",
        "How",
        "It",
        "Its",
        "No",
        "Of",
        "One",
        "The",
        "These",
        "This",
    }
    others |= {"What", "When", "Where", "Whether", "Which", "Who", "Why", "Bytes", "Rows", "Tokens", "Values"}
    assert not VERBS & others
    assert all(re.fullmatch(r"[A-Z][a-z]+", verb) and (verb[-1] != "s" or verb[-2:] == "ss") for verb in VERBS)
    assert [opening(text) for text in ("Rows of K.", "Bytes: all.", "Check a row.")] == ["Rows", "Bytes", "Check"]


QUESTION = re.compile(r"(What|Whether|How|Which|Where|Why|When|Who)\b")


def descriptions() -> Iterator[tuple[str, str]]:
    """Give every module and public class, by file and name, with its docstring; a private class's if it has one."""
    for path in sorted([*ROOT.rglob("*.py"), *LAB.rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module):
                yield path.name, ast.get_docstring(node) or ""
            elif isinstance(node, ast.ClassDef) and (not node.name.startswith("_") or ast.get_docstring(node)):
                yield f"{path.name}:{node.lineno} {node.name}", ast.get_docstring(node) or ""


def test_docstrings_say_what_a_class_or_module_is() -> None:
    """A noun or a verb at once, not a clause whose verb comes last: `The layout of a row`, not `How it is laid out`."""
    found = [f"{place}: {text[:80]}" for place, text in descriptions() if not text or QUESTION.match(text)]
    assert not found, "\n".join(found)
    assert len(list(descriptions())) > 700
    assert QUESTION.match("How a row is laid out.")
    assert not QUESTION.match("Whole rows.")
